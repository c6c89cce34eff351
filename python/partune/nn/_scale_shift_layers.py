"""The layers that SSF follows, each with the scale and shift in the fewest passes over memory.

Merged parameters are computed in float32, or float64 where either factor is.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from partune.nn._layers import AdaptedLayer, computes_with
from partune.nn.scale_shift import ScaleShift
from partune.ops import frozen_linear, layer_norm_scale_shift, rms_norm_scale_shift


class ScaleShiftLayer(AdaptedLayer):
    """A layer that SSF follows."""

    children_name = "scale_shift"
    channel_dim: ClassVar[int | None] = None  # of the output; None: it has to be said
    takes_bias: ClassVar[bool] = True  # so that a shift can be merged
    weight_dim: ClassVar[int] = 0  # of the weight, along the output's channels
    fuses_activation: ClassVar[bool] = False

    weight: Any  # a parameter, or None
    bias: Any
    adapter: ScaleShift

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        """How many the output of a module of the original class has."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[cls.weight_dim]

    @classmethod
    def new_adapter(cls, module: nn.Module, channel_dim: int, **options: Any) -> ScaleShift:
        return ScaleShift(cls.channels(module), channel_dim=channel_dim, **options)

    def merged(self) -> dict[str, Tensor]:
        weight, bias = self.weight, getattr(self, "bias", None)
        if weight is not None and not weight.is_floating_point():
            raise ValueError(f"its weight is {weight.dtype}, want floating point to merge into")
        wide, scale, shift = _wide(self)
        if shift is not None and bias is None and not self.takes_bias:
            raise ValueError(
                f"a {self.original_class.__name__} has no bias to take the shift; train it with "
                "shift=False, or leave the adapter unmerged"
            )
        merged = {"weight": scale}
        if weight is not None:
            shape = [1] * weight.dim()
            shape[self.weight_dim] = -1
            merged["weight"] = weight.detach().to(wide) * scale.view(shape)
        if bias is not None or shift is not None:
            shifted = torch.zeros_like(scale) if bias is None else scale * bias.detach().to(wide)
            merged["bias"] = shifted if shift is None else shifted + shift
        return merged


def _wide(layer: ScaleShiftLayer) -> tuple[torch.dtype, Tensor, Tensor | None]:
    """The dtype to merge in, and scale and shift in it."""
    adapter = layer.adapter
    double = torch.float64 in (adapter.scale.dtype, getattr(layer.weight, "dtype", None))
    wide = torch.float64 if double else torch.float32
    shift = None if adapter.shift is None else adapter.shift.detach().to(wide)
    return wide, adapter.scale.detach().to(wide), shift


class ScaleShiftLinear(ScaleShiftLayer, nn.Linear):
    """The product alone comes from the layer; bias, scale, shift and GELU are one pass after it."""

    original_class = nn.Linear
    channel_dim = -1
    fuses_activation = True

    def forward(self, input: Tensor) -> Tensor:
        return self.adapter.after(frozen_linear(input, self.weight), self.bias, reuse=True)


class ScaleShiftConv1D(ScaleShiftLayer):
    """transformers' linear layer of GPT-2, whose weight is transposed."""

    channel_dim = -1
    fuses_activation = True
    weight_dim = 1

    def forward(self, input: Tensor) -> Tensor:
        return self.adapter.after(frozen_linear(input, self.weight.t()), self.bias, reuse=True)


class ScaleShiftConv(ScaleShiftLayer, _ConvNd):
    """nn.Conv1d, nn.Conv2d and nn.Conv3d."""

    channel_dim = 1
    fuses_activation = True

    def forward(self, input: Tensor) -> Tensor:
        output = self._conv_forward(input, self.weight, None)
        if output.dim() < self.weight.dim():  # without a batch the channels come first
            return self.adapter.after(output.unsqueeze(0), self.bias).squeeze(0)
        return self.adapter.after(output, self.bias, reuse=True)


class ScaleShiftLayerNorm(ScaleShiftLayer, nn.LayerNorm):
    """One pass; the backward works from what the norm keeps anyway."""

    original_class = nn.LayerNorm
    channel_dim = -1

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        assert isinstance(module, nn.LayerNorm)
        return module.normalized_shape[-1]

    def forward(self, input: Tensor) -> Tensor:
        scale, shift = self.adapter.scale, self.adapter.shift
        output: Tensor = layer_norm_scale_shift(
            input, self.weight, self.bias, scale, shift, eps=self.eps
        )
        return output


class ScaleShiftRMSNorm(ScaleShiftLayer):
    """One pass, for the classes that compute `weight * input / rms(input)` over the last dimension.

    `nn.RMSNorm` and transformers' LlamaRMSNorm and its like.
    """

    channel_dim = -1
    takes_bias = False
    bias = None

    def forward(self, input: Tensor) -> Tensor:
        scale, shift = self.adapter.scale, self.adapter.shift
        output: Tensor = rms_norm_scale_shift(
            input, self.weight, scale, shift, eps=rms_eps(self, input.dtype)
        )
        return output


def rms_eps(module: nn.Module, dtype: torch.dtype) -> float:
    """What an RMSNorm adds to the mean square, by the names that such modules give it."""
    for name in ("eps", "variance_epsilon"):
        value = getattr(module, name, None)
        if value is not None:
            return float(value)
    return torch.finfo(dtype).eps  # as nn.RMSNorm does


class ScaleShiftGroupNorm(ScaleShiftLayer, nn.GroupNorm):
    """The norm's own pass: the scale goes into its weight, the shift into its bias."""

    original_class = nn.GroupNorm
    channel_dim = 1

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return int(module.num_channels)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _composed(self.weight, self.bias, self.adapter)
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


def _composed(
    weight: Tensor | None, bias: Tensor | None, adapter: ScaleShift
) -> tuple[Tensor, Tensor | None]:
    scale, shift = adapter.scale, adapter.shift
    composed_bias = None if bias is None else scale * bias
    if shift is not None:
        composed_bias = shift if composed_bias is None else composed_bias + shift
    return scale if weight is None else scale * weight, composed_bias


class BatchNormScaleShift(ScaleShift):
    """With running statistics of its own, so that training leaves the base's alone."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def follow(self, norm: _BatchNorm) -> BatchNormScaleShift:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value = getattr(norm, name)
            self.register_buffer(name, None if value is None else value.clone())
        return self


class ScaleShiftBatchNorm(ScaleShiftLayer, _BatchNorm):
    """nn.BatchNorm1d, nn.BatchNorm2d and nn.BatchNorm3d, as GroupNorm; merges in eval mode."""

    channel_dim = 1
    adapter: BatchNormScaleShift

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        return int(module.num_features)  # type: ignore[arg-type]

    @classmethod
    def new_adapter(cls, module: nn.Module, channel_dim: int, **options: Any) -> ScaleShift:
        assert isinstance(module, _BatchNorm)
        adapter = BatchNormScaleShift(module.num_features, channel_dim=channel_dim, **options)
        return adapter.follow(module)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        own = self.adapter
        weight, bias = _composed(self.weight, self.bias, own)
        momentum = self.momentum
        if self.training and own.num_batches_tracked is not None:
            own.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(own.num_batches_tracked)
        by_batch = self.training or own.running_mean is None
        return F.batch_norm(
            input, own.running_mean, own.running_var, weight, bias, by_batch, momentum or 0.0,
            self.eps,
        )  # fmt: skip

    def merged(self) -> dict[str, Tensor]:
        if self.training:
            raise ValueError("BatchNorm is in training mode; call model.eval() before merging")
        merged = super().merged()
        buffers = self.adapter.named_buffers()
        return {**merged, **{name: value.detach().clone() for name, value in buffers}}


class ScaleShiftOther(ScaleShiftLayer):
    """A layer that computes its output in a way of its own: one pass more."""

    takes_bias = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapter.after(super().forward(*args, **kwargs))

    def merged(self) -> dict[str, Tensor]:
        merged = super().merged()
        if not computes_with(self, merged, self._trial_input()):
            raise ValueError(
                f"a {self.original_class.__name__} computes its output in a way of its own, which "
                "a scaled weight doesn't scale; leave the adapter unmerged"
            )
        return merged

    def _trial_input(self) -> Tensor:
        weight: Tensor = self.weight
        inputs = weight.shape[1] * getattr(self, "groups", 1) if weight.dim() > 1 else len(weight)
        spatial = [2 * size + 3 for size in weight.shape[2:]] or [5, 5]
        shape = (2, inputs, *spatial) if self.adapter.channel_dim == 1 else (2, 3, inputs)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)


class FusedActivation(AdaptedLayer):
    """An activation that the layer before has computed already."""

    def forward(self, input: Tensor) -> Tensor:
        return input
