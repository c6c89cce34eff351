"""Which modules of a model an adapter goes to, by name, and what is trained whole beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from partune.nn._layers import base_modules

# Projections out of the model: never targets by default.
PROJECTIONS_OUT = r"lm_head|pooler\.dense|visual_projection|text_projection"
HEADS = (
    "classifier", "cls_classifier", "distillation_classifier",  # transformers
    "score",  # transformers' decoders that classify
    "head", "head_dist", "fc",  # timm; torchvision's are heads and fc
    "heads",
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """What a method can be put on."""

    method: str
    layers: str  # in words
    takes: Callable[[nn.Module], bool]
    never_by_default: re.Pattern[str]


def check_names(argument: str, names: object) -> None:
    if isinstance(names, str):
        raise TypeError(f"{argument}: got the string {names!r}, want a list of names")


def head_names(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """The modules that are trained whole: those named, or the classifier by its usual names."""
    names = [name for name, _ in base_modules(model) if name]
    if wanted is None:
        found = [name for name in HEADS if name in names]
        # timm's heads of convolutional models: a norm, which is a site, before the classifier
        found = [f"{name}.fc" if f"{name}.fc" in names else name for name in found]
        return [name for name in found if any(True for _ in model.get_submodule(name).parameters())]
    found = []
    for target in wanted:
        hits = [name for name in names if ends_in(name, target)]
        if not hits:
            raise ValueError(
                f"modules_to_save: got {target!r}, which is no module of {type(model).__name__}; "
                f"its top modules are {', '.join(name for name, _ in model.named_children())}"
            )
        found += hits
    return found


def trained_layers(model: nn.Module, heads: Sequence[str]) -> Iterator[str]:
    """The modules under the heads that hold parameters themselves."""
    for head in heads:
        module = model.get_submodule(head)
        if any(True for _ in module.parameters(recurse=False)):
            yield head
        else:
            children = [f"{head}.{name}" for name, _ in module.named_children()]
            yield from trained_layers(model, children)


def target_names(
    model: nn.Module, targets: str | Sequence[str] | None, heads: Sequence[str], rules: Rules
) -> list[str]:
    """The modules that an adapter goes to, in the model's order."""
    names, used = [], set()
    output = _output_embeddings(model)
    for name, module in base_modules(model):
        if targets is None:
            by_default = rules.takes(module) and rules.never_by_default.fullmatch(name) is None
            by_default = by_default and module is not output
            if by_default and not _within(name, heads) and not _runs_inside(model, name):
                names.append(name)
            continue
        hits = _hits(name, targets)
        used |= hits
        if hits and not isinstance(module, nn.Identity):  # which stands for a layer left out
            _check_named(model, name, module, heads, rules)
            names.append(name)
    unused = set() if targets is None or isinstance(targets, str) else set(targets) - used
    if unused or not names:
        examples = [name for name, module in base_modules(model) if rules.takes(module)]
        raise ValueError(
            f"target_modules: {sorted(unused) or targets!r} matched no layer of "
            f"{type(model).__name__}, which has "
            f"{', '.join(examples[:8]) or f'none for {rules.method}'}"
            f"{', ...' if len(examples) > 8 else ''}"
        )
    return names


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    """What a model of transformers turns hidden states into logits by."""
    get: Any = getattr(model, "get_output_embeddings", lambda: None)
    output: nn.Module | None = get()
    return output


def _check_named(
    model: nn.Module, name: str, module: nn.Module, heads: Sequence[str], rules: Rules
) -> None:
    if not rules.takes(module):
        raise TypeError(f"target_modules: {name} is a {type(module).__name__}, want {rules.layers}")
    if _within(name, heads):
        raise ValueError(
            f"target_modules: {name} is in the head, which is trained whole; take it out of "
            "target_modules or modules_to_save"
        )
    if owner := _runs_inside(model, name):
        raise ValueError(
            f"target_modules: {name} is computed by its {owner} without being called, so nothing "
            "can follow it; choose other targets"
        )


def _runs_inside(model: nn.Module, name: str) -> str | None:
    """The class of torch that takes a layer's weights and leaves the layer uncalled."""
    parts = name.split(".")
    for length in range(len(parts)):
        owner = model.get_submodule(".".join(parts[:length]))
        if isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            return type(owner).__name__
    return None


def _within(name: str, heads: Sequence[str]) -> bool:
    return any(name == head or name.startswith(head + ".") for head in heads)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' linear layer of GPT-2, whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and from_transformers(module)


def from_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _hits(name: str, targets: str | Sequence[str]) -> set[str]:
    """The targets that match a module's name: suffixes, or one regular expression for all of it."""
    if isinstance(targets, str):
        return {targets} if re.fullmatch(targets, name) else set()
    return {target for target in targets if ends_in(name, target)}
