"""Where SSF goes: which modules, and what they become."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from partune.nn._layers import hands_on
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
from partune.nn._targets import PROJECTIONS_OUT, Rules, from_transformers, is_conv1d

_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_CHANNELS_FIRST_NORMS = ("LayerNorm2d", "RmsNorm2d", "RMSNorm2d")  # timm, torchvision


def layer_for(module: nn.Module) -> type[ScaleShiftLayer] | None:
    """What a module becomes; None where SSF can't follow it."""
    forward = type(module).forward
    layer: type[ScaleShiftLayer] | None = None
    if isinstance(module, nn.Linear):
        layer = ScaleShiftLinear if forward is nn.Linear.forward else ScaleShiftOther
    elif is_conv1d(module):
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
    return -1 if from_transformers(module) else None


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


RULES = Rules(
    "SSF",
    "a linear layer, a convolution or a norm over the channels",
    lambda module: layer_for(module) is not None,
    # and what the paper leaves out
    re.compile(rf"(.*\.)?({PROJECTIONS_OUT}|downsample\.reduction)"),
)
