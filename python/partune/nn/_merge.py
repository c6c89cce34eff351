"""merge: fold an adapter into the weights of the plain layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from partune.nn._layers import AdaptedLayer, base_state, write
from partune.nn._registry import attached, detach, registry_of

_BIAS_FLAGS = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "bias")  # of transformers


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did.

    Attributes:
        layers: how many were changed.
        largest_drift: largest |difference| of the outputs on the batch; None without a batch.
        relative_drift: the same, relative to the largest |output|.
        biases: names of those that were created.
    """

    layers: int
    largest_drift: float | None
    relative_drift: float | None
    biases: tuple[str, ...]


def merge(model: nn.Module, batch: Any = None, *, name: str | None = None) -> MergeReport:
    """Fold an adapter into the base's weights, in float32: the plain model then computes the same.

    The layers get their own classes back and nothing of the adapter is left over, so the model
    saves, loads and runs as any of its kind. A bias is created where a shift needs one: in a
    transformers model only if its config can say so (`attention_bias` and the like, which are then
    set), because `from_pretrained` drops what the config doesn't know. `detach` before merging
    gives the base back; afterwards nothing does.

    Args:
        batch: to measure the drift with, in eval mode: a tensor, a tuple of positional or a mapping
            of keyword arguments. None: not measured.
        name: of the adapter, the only one attached; None: that one.

    Raises:
        ValueError: no adapter or several; a shift where no bias can be (RMSNorm, a layer whose bias
            the config can't express); BatchNorm in training mode; a weight that is shared with
            another module; a layer whose own forward doesn't scale with its weight. Then nothing is
            changed.

    Reference: Scaling & Shifting Your Features (arXiv 2210.08823), section 3.3.

    Example:
        >>> from partune.nn import ScaleShiftConfig, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 8)), ScaleShiftConfig())
        >>> merge(model, torch.ones(2, 4)).relative_drift < 1e-5
        True
    """
    name, adapter = attached(model, name)
    registry = registry_of(model)
    assert registry is not None
    if len(registry.adapters) > 1:
        raise ValueError(
            f"name: {sorted(registry.adapters)} are attached, want one; detach the others first"
        )
    if registry.active is None:
        raise ValueError(f"name: {name!r} is not active; call set_adapter(model, {name!r}) first")
    merged = {
        layer_name: _merged(model, layer_name)
        for layer_name, layer in adapter.layers.items()
        if layer.children_name
    }
    refuse_shared(model, merged)
    created = _created(model, merged)
    flags, zeros = expressed(model, created) if created else ((), [])
    before = None if batch is None else _outputs(model, batch)
    detach(model)
    for layer_name, parameters in merged.items():
        write(model.get_submodule(layer_name), parameters)
    add_biases(model, flags, zeros)
    drift, relative = (None, None) if before is None else _drift(before, _outputs(model, batch))
    return MergeReport(len(merged), drift, relative, (*created, *zeros))


def _merged(model: nn.Module, name: str) -> dict[str, Tensor]:
    layer = model.get_submodule(name)
    assert isinstance(layer, AdaptedLayer)
    try:
        return layer.merged()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _created(model: nn.Module, merged: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """The parameters that the plain layers don't have yet."""
    return [
        f"{layer_name}.{parameter}"
        for layer_name, parameters in merged.items()
        for parameter in parameters
        if getattr(model.get_submodule(layer_name), parameter) is None
    ]


def refuse_shared(model: nn.Module, names: Iterable[str]) -> None:
    """Weights that another module reads too would change there as well."""
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    for name in names:
        for key, parameter in model.get_submodule(name).named_parameters(recurse=False):
            if len(owners[parameter]) > 1:
                raise ValueError(
                    f"{name}: its {key} is shared with another module, which merging would change; "
                    "leave the adapter unmerged"
                )


def expressed(model: nn.Module, created: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """The config's flags with which a transformers model has the created parameters.

    And the further biases that it then has. The model is built on the meta device to know; a
    module without a config, or whose config needs no flag, takes any.
    """
    config = getattr(model, "config", None)
    if not hasattr(model, "save_pretrained") or not hasattr(config, "to_dict"):
        return (), []
    wanted = {*base_state(model), *created}
    off = [flag for flag in _BIAS_FLAGS if getattr(config, flag, None) is False]
    for count in range(len(off) + 1):
        for flags in combinations(off, count):
            trial = copy.deepcopy(config)
            for flag in flags:
                setattr(trial, flag, True)
            with torch.device("meta"):
                keys = set(type(model)(trial).state_dict())
            further = sorted(keys - wanted)
            if wanted <= keys and all(key.endswith(".bias") for key in further):
                return flags, further
    raise ValueError(
        f"{created[0]}: the config of a {type(model).__name__} can't express this bias, and "
        "from_pretrained would drop it; train with shift=False, or leave the adapter unmerged"
    )


def add_biases(model: nn.Module, flags: Iterable[str], zeros: Iterable[str]) -> None:
    """Set what `expressed` found, and give the model the further biases as zeros."""
    for bias in zeros:
        layer_name = bias.removesuffix(".bias")
        module = model.get_submodule(layer_name)
        write(module, {"bias": torch.zeros(len(model.get_parameter(f"{layer_name}.weight")))})
    for flag in flags:
        setattr(model.config, flag, True)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    with _eval_mode(model):
        if isinstance(batch, Mapping):
            return list(_tensors(model(**batch)))
        return list(_tensors(model(*batch) if isinstance(batch, tuple) else model(batch)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _drift(before: list[Tensor], after: list[Tensor]) -> tuple[float, float]:
    """Largest |difference|, and largest relative to the largest |output| of the same tensor."""
    pairs = [(old.double(), new.double()) for old, new in zip(before, after, strict=True)]
    pairs = [(old, new) for old, new in pairs if old.numel() > 0]
    largest = [float((new - old).abs().amax()) for old, new in pairs]
    sizes = [float(old.abs().amax()) for old, _ in pairs]
    relative = [d / size if size else d for d, size in zip(largest, sizes, strict=True)]
    return max(largest, default=0.0), max(relative, default=0.0)
