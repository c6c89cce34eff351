"""Where SSF goes: which modules, what they become, what is trained beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from partune.nn._layers import base_modules, hands_on
from partune.nn._scale_shift_layers import (
    ScaleShiftBatchNorm,
    ScaleShiftConv,
    ScaleShiftConv1D,
    ScaleShiftGroupNorm,
    ScaleShiftLayer,
    ScaleShiftLayerNorm,
    ScaleShiftLinear,
    ScaleShiftOther,
    ScaleShiftRMSNorm,
    rms_eps,
)

# Never sites by default: projections out of the model, and what the paper leaves out.
NO_SITES = re.compile(
    r"(.*\.)?(lm_head|pooler\.dense|visual_projection|text_projection|downsample\.reduction)"
)
HEADS = (
    "classifier", "cls_classifier", "distillation_classifier",  # transformers
    "score",  # transformers' decoders that classify
    "head", "head_dist", "fc",  # timm; torchvision's are heads and fc
    "heads",
)  # fmt: skip
_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_CHANNELS_FIRST_NORMS = ("LayerNorm2d", "RmsNorm2d", "RMSNorm2d")  # timm, torchvision


def layer_for(module: nn.Module) -> type[ScaleShiftLayer] | None:
    """What a module becomes; None where SSF can't follow it."""
    forward = type(module).forward
    layer: type[ScaleShiftLayer] | None = None
    if isinstance(module, nn.Linear):
        layer = ScaleShiftLinear if forward is nn.Linear.forward else ScaleShiftOther
    elif type(module).__name__ == "Conv1D" and _from_transformers(module):
        layer = ScaleShiftConv1D
    elif isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        layer = ScaleShiftConv if forward in _CONVOLUTIONS else ScaleShiftOther
    elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        fused = forward is nn.LayerNorm.forward or hands_on(type(module), ScaleShiftLayerNorm)
        layer = ScaleShiftLayerNorm if fused else ScaleShiftOther
    elif isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
        layer = ScaleShiftBatchNorm if forward is _BatchNorm.forward else None
    elif isinstance(module, nn.GroupNorm):
        layer = ScaleShiftGroupNorm if forward is nn.GroupNorm.forward else ScaleShiftOther
    elif "rmsnorm" in type(module).__name__.lower() and _has_vector_weight(module):
        layer = ScaleShiftRMSNorm if _computes_rms_norm(module) else ScaleShiftOther
    return layer


def channel_dim_of(module: nn.Module, layer: type[ScaleShiftLayer]) -> int | None:
    """Where a module's class has the channels of its output; None where both are possible."""
    if layer is not ScaleShiftOther:
        return layer.channel_dim
    if isinstance(module, nn.Linear):
        return -1
    if isinstance(module, _ConvNd | nn.GroupNorm) or (
        type(module).__name__ in _CHANNELS_FIRST_NORMS
    ):
        return 1
    return -1 if _from_transformers(module) else None


def _from_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def _has_vector_weight(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1


@torch.no_grad()
def _computes_rms_norm(module: nn.Module) -> bool:
    """Whether it is `weight * x / rms(x)`, tried on some rows: Gemma's, for one, adds 1."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    rows = torch.linspace(-3, 2, 3 * weight.numel(), device=weight.device)
    rows = rows.view(3, -1).to(weight.dtype)
    wanted = F.rms_norm(rows, weight.shape, weight, rms_eps(module, weight.dtype))
    tolerance = 4 * torch.finfo(weight.dtype).eps * float(wanted.abs().amax())
    try:
        got = module(rows)
    except (RuntimeError, TypeError, ValueError):  # it wants another input
        return False
    return got.dtype == wanted.dtype and bool(torch.all((got - wanted).abs() <= tolerance))


def is_decoder(model: nn.Module) -> bool:
    """Whether a model predicts the next token, so that its layers have no bias by custom."""
    if hasattr(model, "lm_head"):
        return True
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


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
        hits = [name for name in names if _ends_in(name, target)]
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


def site_names(
    model: nn.Module, targets: str | Sequence[str] | None, heads: Sequence[str]
) -> list[str]:
    """The modules that SSF follows, in the model's order."""
    sites, used = [], set()
    for name, module in base_modules(model):
        if targets is None:
            if _is_default_site(name, module, heads) and not _runs_inside(model, name):
                sites.append(name)
            continue
        hits = _hits(name, targets)
        used |= hits
        if hits and not isinstance(module, nn.Identity):  # which stands for a layer left out
            _check_named_site(model, name, module, heads)
            sites.append(name)
    unused = set() if targets is None or isinstance(targets, str) else set(targets) - used
    if unused or not sites:
        examples = [name for name, module in base_modules(model) if layer_for(module)]
        raise ValueError(
            f"target_modules: {sorted(unused) or targets!r} matched no layer of "
            f"{type(model).__name__}, which has {', '.join(examples[:8]) or 'none for SSF'}"
            f"{', ...' if len(examples) > 8 else ''}"
        )
    return sites


def _is_default_site(name: str, module: nn.Module, heads: Sequence[str]) -> bool:
    return (
        layer_for(module) is not None
        and NO_SITES.fullmatch(name) is None
        and not _within(name, heads)
    )


def _check_named_site(model: nn.Module, name: str, module: nn.Module, heads: Sequence[str]) -> None:
    if layer_for(module) is None:
        raise TypeError(
            f"target_modules: {name} is a {type(module).__name__}, want a linear layer, a "
            "convolution or a norm over the channels"
        )
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


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _hits(name: str, targets: str | Sequence[str]) -> set[str]:
    """The targets that match a module's name: suffixes, or one regular expression for all of it."""
    if isinstance(targets, str):
        return {targets} if re.fullmatch(targets, name) else set()
    return {target for target in targets if _ends_in(name, target)}
