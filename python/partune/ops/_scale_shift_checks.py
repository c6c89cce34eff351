"""Family scale_shift: the checks that its wrappers and its fake kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from partune.ops import _checks as check

ACTIVATIONS = ("none", "gelu", "gelu_tanh")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_dense(value: Tensor, channel_dim: int) -> bool:
    """Contiguous; or, with channels in dimension 1, contiguous in torch's channels-last order."""
    if value.is_contiguous():
        return True
    memory_format = CHANNELS_LAST.get(value.dim()) if channel_dim == 1 else None
    return memory_format is not None and value.is_contiguous(memory_format=memory_format)


def _check_input(name: str, value: Tensor, channel_dim: int) -> int:
    """Of a tensor with channels; how many there are."""
    check.tensor(name, value, None)
    check.dtype(name, value, check.FLOATING)
    if channel_dim not in (-1, 1):
        raise ValueError(
            f"channel_dim: got {channel_dim}, want -1 (channels last) or 1 (channels first)"
        )
    wanted = 1 if channel_dim == -1 else 2
    if value.dim() < wanted:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, want at least {wanted} dimensions "
            f"with channel_dim={channel_dim}"
        )
    if not is_dense(value, channel_dim):
        raise ValueError(
            f"{name}: got strides {value.stride()} for shape {tuple(value.shape)}, want a "
            "contiguous tensor (or, with channel_dim=1, a channels-last one)"
        )
    return value.shape[channel_dim]


def _check_vector(name: str, value: Tensor, like: Tensor, channels: int) -> None:
    """One number per channel, of the input's dtype or, beside 16-bit inputs, of float32."""
    check.tensor(name, value, like.device)
    wide = (torch.float32,) if like.dtype in check.SIXTEEN_BIT else ()
    check.dtype(name, value, (like.dtype, *wide))
    if value.dim() != 1 or value.shape[0] != channels:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, want ({channels},), one per channel"
        )
    check.contiguous(name, value)


def _check_vectors(
    like: Tensor,
    channels: int,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    _check_vector("scale", scale, like, channels)
    if shift is not None:
        _check_vector("shift", shift, like, channels)
        check.dtype("shift", shift, (scale.dtype,))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _check_vector(name, value, like, channels)


def _check_like(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """A tensor of another's shape, dtype, device and layout."""
    check.tensor(name, value, like.device)
    check.dtype(name, value, (like.dtype,))
    check.shape(name, value, like.shape)
    if value.is_contiguous() != like.is_contiguous():
        raise ValueError(
            f"{name}: got strides {value.stride()}, want those of {like_name}, {like.stride()}"
        )


def check_scale_shift(
    input: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    channel_dim: int = -1,
) -> None:
    channels = _check_input("input", input, channel_dim)
    _check_vectors(input, channels, scale, shift, None, bias)
    check.one_of("activation", activation, ACTIVATIONS)


def check_scale_shift_(
    input: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_dim: int = -1,
) -> None:
    check_scale_shift(input, scale, shift, bias, channel_dim=channel_dim)


def check_scale_shift_backward(
    grad: Tensor,
    saved: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    channel_dim: int = -1,
    from_output: bool = False,
    input_grad: bool = True,
    scale_grad: bool = True,
) -> None:
    channels = _check_input("grad", grad, channel_dim)
    _check_vectors(grad, channels, scale, shift, None, bias)
    check.one_of("activation", activation, ACTIVATIONS)
    if from_output and activation != "none":
        raise ValueError(
            f"from_output: got True with activation {activation!r}, want False: the input can't "
            "be told from such an output"
        )
    if saved is not None:
        _check_input("saved", saved, channel_dim)
        _check_like("saved", saved, "grad", grad)
    elif scale_grad or activation != "none":
        raise ValueError("saved: got None, want the op's input or output")


def _check_eps(eps: float) -> None:
    if not eps >= 0.0:
        raise ValueError(f"eps: got {eps}, want at least 0")


def check_layer_norm_scale_shift(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    eps: float,
) -> None:
    channels = _check_input("input", input, -1)
    _check_vectors(input, channels, scale, shift, weight, bias)
    _check_eps(eps)


def check_rms_norm_scale_shift(
    input: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    eps: float,
) -> None:
    check_layer_norm_scale_shift(input, weight, None, scale, shift, eps=eps)


def _check_statistic(name: str, value: Tensor, input: Tensor) -> None:
    check.tensor(name, value, input.device)
    double = input.dtype == torch.float64
    check.dtype(name, value, (torch.float64 if double else torch.float32,))
    check.shape(name, value, input.shape[:-1])
    check.contiguous(name, value)


def _check_norm_backward(
    grad: Tensor,
    input: Tensor,
    statistics: dict[str, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
) -> None:
    channels = _check_input("grad", grad, -1)
    _check_like("input", input, "grad", grad)
    _check_vectors(grad, channels, scale, None, weight, bias)
    for name, value in statistics.items():
        _check_statistic(name, value, grad)


def check_layer_norm_scale_shift_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    *,
    input_grad: bool = True,
    scale_grad: bool = True,
) -> None:
    _check_norm_backward(grad, input, {"mean": mean, "rstd": rstd}, weight, bias, scale)


def check_rms_norm_scale_shift_backward(
    grad: Tensor,
    input: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    *,
    input_grad: bool = True,
    scale_grad: bool = True,
) -> None:
    _check_norm_backward(grad, input, {"rstd": rstd}, weight, None, scale)
