"""Family scale_shift: a norm over the last dimension, and the scale and shift after it."""

from __future__ import annotations

import torch
from torch import Tensor

from partune.ops import _scale_shift_autograd as autograd
from partune.ops import _scale_shift_reference as reference
from partune.ops._contract import Op, call, register
from partune.ops._scale_shift_checks import (
    check_layer_norm_scale_shift,
    check_layer_norm_scale_shift_backward,
    check_rms_norm_scale_shift,
    check_rms_norm_scale_shift_backward,
)

Three = tuple[Tensor, Tensor, Tensor]


def layer_norm_scale_shift(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    eps: float,
) -> Tensor:
    """Normalise the last dimension, then scale and shift: scale·LayerNorm(input) + shift.

    SSF, arXiv 2210.08823, section 3.2, after a torch.nn.LayerNorm. Differentiable, once, for all
    tensors. Saves the input and two numbers a row, as the norm alone does.

    Args:
        input: [..., channels] of float64, float32, bfloat16 or float16; copied where it isn't
            contiguous.
        weight, bias: the norm's [channels], of the input's dtype or float32 beside 16-bit inputs.
        scale, shift: [channels], of one dtype: the input's, or float32 beside 16-bit inputs.
        eps: added to the variance.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        TypeError: another dtype.
        ValueError: vectors that do not fit the channels, on another device or not contiguous; a
            negative eps.
        RuntimeError: a second derivative was asked for.

    Example:
        >>> x = torch.tensor([[1.0, 3.0]])
        >>> layer_norm_scale_shift(x, None, None, torch.tensor([2.0, 3.0]), eps=0.0)
        tensor([[-2.,  3.]])
    """
    return call(  # type: ignore[no-any-return]
        "layer_norm_scale_shift", _contiguous(input), weight, bias, scale, shift, eps=eps
    )[0]


def rms_norm_scale_shift(
    input: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    eps: float,
) -> Tensor:
    """Normalise the last dimension, then scale and shift: scale·RMSNorm(input) + shift.

    SSF, arXiv 2210.08823, section 3.2, after a torch.nn.RMSNorm. Differentiable, once, for all
    tensors. Saves the input and a number a row, as the norm alone does.

    Args:
        input, weight, scale, shift: as for `layer_norm_scale_shift`.
        eps: added to the mean of squares.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as `layer_norm_scale_shift`.

    Example:
        >>> x = torch.tensor([[3.0, -3.0]])
        >>> rms_norm_scale_shift(x, None, torch.tensor([2.0, 5.0]), eps=0.0)
        tensor([[ 2., -5.]])
    """
    return call(  # type: ignore[no-any-return]
        "rms_norm_scale_shift", _contiguous(input), weight, scale, shift, eps=eps
    )[0]


def layer_norm_scale_shift_backward(
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
    """Differentiate `layer_norm_scale_shift`, in one pass over memory.

    Args:
        grad: the output's gradient, contiguous, in its dtype.
        input: what was normalised.
        mean, rstd: [...], each row's mean and 1/sqrt(variance + eps), of float32, or float64 for
            float64 inputs.
        weight, bias, scale: as given to `layer_norm_scale_shift`.
        input_grad, scale_grad: which gradients are wanted.

    Returns:
        The gradients of input, scale and shift, the last two in scale's dtype; tensors of no
        elements for those that aren't wanted.

    Raises:
        TypeError: another dtype.
        ValueError: shapes, layouts or devices that do not agree.

    Example:
        >>> x, row = torch.tensor([[1.0, 3.0]]), torch.ones(1)
        >>> layer_norm_scale_shift_backward(
        ...     torch.ones(1, 2), x, 2 * row, row, None, None, torch.ones(2), input_grad=False)
        (tensor([]), tensor([-1.,  1.]), tensor([1., 1.]))
    """
    return call(  # type: ignore[no-any-return]
        "layer_norm_scale_shift_backward", grad, input, mean, rstd, weight, bias, scale,
        input_grad=input_grad, scale_grad=scale_grad,
    )  # fmt: skip


def rms_norm_scale_shift_backward(
    grad: Tensor,
    input: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    *,
    input_grad: bool = True,
    scale_grad: bool = True,
) -> Three:
    """Differentiate `rms_norm_scale_shift`, in one pass over memory.

    Args:
        grad, input, weight, scale, input_grad, scale_grad: as for
            `layer_norm_scale_shift_backward`.
        rstd: [...], each row's 1/sqrt(mean of squares + eps).

    Returns:
        As `layer_norm_scale_shift_backward`.

    Raises:
        TypeError, ValueError: as `layer_norm_scale_shift_backward`.

    Example:
        >>> x, row = torch.tensor([[1.0, 3.0]]), torch.ones(1)
        >>> rms_norm_scale_shift_backward(
        ...     torch.ones(1, 2), x, row, None, torch.ones(2), input_grad=False)
        (tensor([]), tensor([1., 3.]), tensor([1., 1.]))
    """
    return call(  # type: ignore[no-any-return]
        "rms_norm_scale_shift_backward", grad, input, rstd, weight, scale,
        input_grad=input_grad, scale_grad=scale_grad,
    )  # fmt: skip


def _contiguous(value: Tensor) -> Tensor:
    return value.contiguous() if isinstance(value, Tensor) else value


def _statistics(input: Tensor) -> Tensor:
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty(input.shape[:-1], dtype=wide)


def fake_layer_norm_scale_shift(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    eps: float,
) -> Three:
    return torch.empty_like(input), _statistics(input), _statistics(input)


def fake_rms_norm_scale_shift(
    input: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), _statistics(input)


def fake_layer_norm_scale_shift_backward(
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
    grad_input = torch.empty_like(grad) if input_grad else grad.new_empty(0)
    size = scale.shape if scale_grad else (0,)
    return grad_input, scale.new_empty(size), scale.new_empty(size)


def fake_rms_norm_scale_shift_backward(
    grad: Tensor,
    input: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    *,
    input_grad: bool = True,
    scale_grad: bool = True,
) -> Three:
    return fake_layer_norm_scale_shift_backward(
        grad, input, rstd, rstd, weight, None, scale,
        input_grad=input_grad, scale_grad=scale_grad,
    )  # fmt: skip


register(
    Op(
        "layer_norm_scale_shift", "scale_shift", layer_norm_scale_shift,
        check_layer_norm_scale_shift, fake_layer_norm_scale_shift,
        reference.reference_layer_norm_scale_shift,
        autograd.setup_layer_norm, autograd.backward_layer_norm,
    )
)  # fmt: skip
register(
    Op(
        "rms_norm_scale_shift", "scale_shift", rms_norm_scale_shift, check_rms_norm_scale_shift,
        fake_rms_norm_scale_shift, reference.reference_rms_norm_scale_shift,
        autograd.setup_rms_norm, autograd.backward_rms_norm,
    )
)  # fmt: skip
register(
    Op(
        "layer_norm_scale_shift_backward", "scale_shift", layer_norm_scale_shift_backward,
        check_layer_norm_scale_shift_backward, fake_layer_norm_scale_shift_backward,
        reference.reference_layer_norm_scale_shift_backward,
    )
)  # fmt: skip
register(
    Op(
        "rms_norm_scale_shift_backward", "scale_shift", rms_norm_scale_shift_backward,
        check_rms_norm_scale_shift_backward, fake_rms_norm_scale_shift_backward,
        reference.reference_rms_norm_scale_shift_backward,
    )
)  # fmt: skip
