"""Family scale_shift: y = act(scale·(x + bias) + shift), one pair of numbers per channel (SSF)."""

from __future__ import annotations

import torch
from torch import Tensor

from partune.ops import _scale_shift_autograd as autograd
from partune.ops import _scale_shift_reference as reference
from partune.ops._contract import Op, call, register
from partune.ops._scale_shift_checks import (
    check_scale_shift,
    check_scale_shift_,
    check_scale_shift_backward,
    is_dense,
)

Three = tuple[Tensor, Tensor, Tensor]


def scale_shift(
    input: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    channel_dim: int = -1,
    inplace: bool = False,
) -> Tensor:
    """Scale and shift every channel: y = act(scale·(input + bias) + shift).

    SSF, arXiv 2210.08823, section 3.2. Differentiable, once, for all tensors. The backward is one
    pass over memory. A site without activation saves its output alone, and its backward tells the
    input from it, where `scale` is large enough (`kept_inputs` counts where it isn't); one with an
    activation saves its input.

    Args:
        input: float64, float32, bfloat16 or float16, [..., channels], or [batch, channels, ...]
            with channel_dim=1. Taken as it is where it is contiguous or, with channel_dim=1, in
            torch's channels-last order; else copied.
        scale: [channels], of the input's dtype, or float32 beside 16-bit inputs.
        shift: [channels], of scale's dtype.
        bias: [channels], of the input's dtype or float32 beside 16-bit inputs: that of the linear
            or convolution before.
        activation: "none", "gelu" or "gelu_tanh".
        channel_dim: -1 or 1.
        inplace: overwrite `input`, which must be dense, as above, and no leaf that requires grad;
            without activation only. Under torch.compile and torch.export it is left as it is.

    Returns:
        A tensor of the input's shape, dtype and layout, or `input` itself with inplace=True.

    Raises:
        TypeError: another dtype.
        ValueError: vectors that do not fit the channels, on another device or not contiguous;
            another activation or channel_dim; an input that can't be overwritten.
        RuntimeError: a second derivative was asked for.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> scale_shift(x, torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
        tensor([[2., 7.]])
    """
    if inplace:
        _check_inplace(input, activation)
        if not (torch.compiler.is_compiling() or torch.compiler.is_exporting()):
            check_scale_shift_(input, scale, shift, bias, channel_dim=channel_dim)
            return autograd.ScaleShiftInPlace.apply(  # type: ignore[no-any-return,no-untyped-call]
                input, scale, shift, bias, channel_dim
            )
    return call(  # type: ignore[no-any-return]
        "scale_shift", _dense(input, channel_dim), scale, shift, bias,
        activation=activation, channel_dim=channel_dim,
    )  # fmt: skip


def scale_shift_(
    input: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_dim: int = -1,
) -> None:
    """Overwrite `input` with scale·(input + bias) + shift; without autograd.

    What `scale_shift(..., inplace=True)` runs on, which is differentiable.

    Args:
        input: as for `scale_shift`; dense.
        scale, shift, bias, channel_dim: as for `scale_shift`.

    Raises:
        TypeError: another dtype.
        ValueError: as for `scale_shift`, and an input with gaps.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> scale_shift_(x, torch.tensor([2.0, 3.0]))
        >>> x
        tensor([[2., 6.]])
    """
    call("scale_shift_", input, scale, shift, bias, channel_dim=channel_dim)


def scale_shift_backward(
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
    """Differentiate `scale_shift`, in one pass over memory.

    Args:
        grad: the output's gradient, in its dtype and layout.
        saved: the input; or the output, with from_output=True and no activation. It may be None
            where neither scale_grad nor an activation needs it.
        scale, shift, bias, activation, channel_dim: as given to `scale_shift`.
        input_grad, scale_grad: which gradients are wanted.

    Returns:
        The gradients of input, scale and shift, the last two in scale's dtype (bias has scale
        times shift's); tensors of no elements for those that aren't wanted.

    Raises:
        TypeError: another dtype.
        ValueError: shapes, layouts or devices that do not agree; nothing saved where it is needed.

    Example:
        >>> x, scale = torch.tensor([[1.0, 2.0]]), torch.tensor([2.0, 3.0])
        >>> scale_shift_backward(torch.ones(1, 2), x, scale)
        (tensor([[2., 3.]]), tensor([1., 2.]), tensor([1., 1.]))
    """
    return call(  # type: ignore[no-any-return]
        "scale_shift_backward", grad, saved, scale, shift, bias,
        activation=activation, channel_dim=channel_dim, from_output=from_output,
        input_grad=input_grad, scale_grad=scale_grad,
    )  # fmt: skip


def _dense(value: Tensor, channel_dim: int) -> Tensor:
    if not isinstance(value, Tensor) or is_dense(value, channel_dim):
        return value
    return value.contiguous()


def _check_inplace(input: Tensor, activation: str) -> None:
    if activation != "none":
        raise ValueError(
            f"inplace: got True with activation {activation!r}, want False: the backward needs "
            "the input"
        )
    is_leaf = isinstance(input, Tensor) and input.requires_grad and input.is_leaf
    if is_leaf and torch.is_grad_enabled():
        raise ValueError(
            "inplace: got True for a leaf that requires grad, want False, or the output of "
            "another operation"
        )


def fake_scale_shift(
    input: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    channel_dim: int = -1,
) -> Tensor:
    return torch.empty_like(input)


def fake_scale_shift_(
    input: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_dim: int = -1,
) -> None:
    return None


def fake_scale_shift_backward(
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
    grad_input = torch.empty_like(grad) if input_grad else grad.new_empty(0)
    size = scale.shape if scale_grad else (0,)
    return grad_input, scale.new_empty(size), scale.new_empty(size)


register(
    Op(
        "scale_shift", "scale_shift", scale_shift, check_scale_shift, fake_scale_shift,
        reference.reference_scale_shift, autograd.setup_scale_shift, autograd.backward_scale_shift,
    )
)  # fmt: skip
register(
    Op(
        "scale_shift_", "scale_shift", scale_shift_, check_scale_shift_, fake_scale_shift_,
        reference.reference_scale_shift_,
    )
)  # fmt: skip
register(
    Op(
        "scale_shift_backward", "scale_shift", scale_shift_backward, check_scale_shift_backward,
        fake_scale_shift_backward, reference.reference_scale_shift_backward,
    )
)  # fmt: skip
