"""Family scale_shift in plain torch: the oracle of the tests, and the kernel of other devices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Three = tuple[Tensor, Tensor, Tensor]


def _compute(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _broadcast(vector: Tensor | None, like: Tensor, channel_dim: int, missing: float) -> Tensor:
    """One number per channel, widened, in a shape that broadcasts against the input's."""
    if vector is None:
        return torch.full((), missing, dtype=_compute(like), device=like.device)
    wide = vector.to(_compute(like))
    return wide if channel_dim == -1 else wide.view(-1, *[1] * (like.dim() - 2))


def _channel_sums(value: Tensor, channel_dim: int) -> Tensor:
    channel = channel_dim % value.dim()
    others = [dim for dim in range(value.dim()) if dim != channel]
    return value.sum(others) if others else value


def _activate(z: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return z
    return torch.nn.functional.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activation_derivative(z: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return torch.ones_like(z)
    if activation == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(-z / math.sqrt(2)) + z * density
    argument = math.sqrt(8 / math.pi) * (z + 0.044715 * z**3)
    slope = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * z * z)
    logistic = torch.sigmoid(argument)
    return logistic + z * logistic * torch.sigmoid(-argument) * slope


def reference_scale_shift(
    input: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    channel_dim: int = -1,
) -> Tensor:
    biased = input.to(_compute(input)) + _broadcast(bias, input, channel_dim, 0.0)
    z = biased * _broadcast(scale, input, channel_dim, 1.0)
    z = z + _broadcast(shift, input, channel_dim, 0.0)
    return _activate(z, activation).to(input.dtype)


def reference_scale_shift_(
    input: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_dim: int = -1,
) -> None:
    input.copy_(reference_scale_shift(input, scale, shift, bias, channel_dim=channel_dim))


def reference_scale_shift_backward(
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
) -> Three:
    wide_scale = _broadcast(scale, grad, channel_dim, 1.0)
    wide_shift = _broadcast(shift, grad, channel_dim, 0.0)
    inner = grad.to(_compute(grad))
    biased = torch.zeros_like(inner)
    if saved is not None:
        known = saved.to(_compute(grad))
        if from_output:
            biased = (known - wide_shift) / wide_scale
        else:
            biased = known + _broadcast(bias, grad, channel_dim, 0.0)
    if activation != "none":
        inner = inner * _activation_derivative(biased * wide_scale + wide_shift, activation)
    nothing = grad.new_empty(0)
    grad_input = (inner * wide_scale).to(grad.dtype) if input_grad else nothing
    if not scale_grad:
        return grad_input, scale.new_empty(0), scale.new_empty(0)
    sums = (_channel_sums(value, channel_dim).to(scale.dtype) for value in (inner * biased, inner))
    return grad_input, *sums  # type: ignore[return-value]


def _affine(
    normalised: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    if weight is not None:
        normalised = normalised * weight.to(normalised.dtype)
    return normalised if bias is None else normalised + bias.to(normalised.dtype)


def reference_layer_norm_scale_shift(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    eps: float,
) -> Three:
    wide = input.to(_compute(input))
    mean = wide.mean(-1)
    centred = wide - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    normed = _affine(centred * rstd.unsqueeze(-1), weight, bias)
    return _affine(normed, scale, shift).to(input.dtype), mean, rstd


def reference_rms_norm_scale_shift(
    input: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    wide = input.to(_compute(input))
    rstd = (wide.square().mean(-1) + eps).rsqrt()
    normed = _affine(wide * rstd.unsqueeze(-1), weight, None)
    return _affine(normed, scale, shift).to(input.dtype), rstd


def reference_layer_norm_scale_shift_backward(
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
) -> Three:
    normalised = (input.to(_compute(input)) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    return _norm_backward(grad, normalised, rstd, weight, bias, scale, True, input_grad, scale_grad)


def reference_rms_norm_scale_shift_backward(
    grad: Tensor,
    input: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    *,
    input_grad: bool = True,
    scale_grad: bool = True,
) -> Three:
    normalised = input.to(_compute(input)) * rstd.unsqueeze(-1)
    return _norm_backward(
        grad, normalised, rstd, weight, None, scale, False, input_grad, scale_grad
    )


def _norm_backward(
    grad: Tensor,
    normalised: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    centred: bool,
    input_grad: bool,
    scale_grad: bool,
) -> Three:
    wide = grad.to(normalised.dtype)
    grad_input, grad_scale, grad_shift = grad.new_empty(0), scale.new_empty(0), scale.new_empty(0)
    if input_grad:
        inner = _affine(wide * scale.to(wide.dtype), weight, None)
        projected = normalised * (inner * normalised).mean(-1, keepdim=True)
        if centred:
            projected = projected + inner.mean(-1, keepdim=True)
        grad_input = ((inner - projected) * rstd.unsqueeze(-1)).to(grad.dtype)
    if scale_grad:
        grad_scale = _channel_sums(wide * _affine(normalised, weight, bias), -1).to(scale.dtype)
        grad_shift = _channel_sums(wide, -1).to(scale.dtype)
    return grad_input, grad_scale, grad_shift
