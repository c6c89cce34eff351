"""The product of a frozen linear layer, and its gradient for the input.

torch multiplies float32 matrices with MKL, which on AMD's processors leaves a part of AVX-512's
rate unused; oneDNN, which comes with torch too, doesn't. Of a Zen 4's rate, measured on two cores
at 512 to 2048 tokens and 1024 to 4096 features, they reach 65 to 81 % and 80 to 94 %.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partune import _native
from partune.ops._autocast import autocast_is_on
from partune.ops._contract import below_autograd

# With fewer rows to multiply, setting up oneDNN's product takes longer than it saves (measured).
_LEAST_ROWS = 8
_PLAIN = (Tensor, nn.Parameter)


def frozen_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run a linear layer whose weight and bias don't train: y = x Wᵀ + b.

    What `torch.nn.functional.linear` computes, by the faster of torch's two libraries. A weight or
    bias that trains, autocast and compilers take that function itself. Differentiable, any number
    of times, with respect to the input; saved for that is the weight alone.

    Args:
        input: floating point, [..., in].
        weight: [out, in], of the input's dtype.
        bias: [out], or None.

    Returns:
        [..., out].

    Raises:
        RuntimeError: shapes or dtypes that don't multiply.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> frozen_linear(x, torch.tensor([[3.0, 5.0]])).backward()
        >>> x.grad
        tensor([[3., 5.]])
    """
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trains or autocast_is_on(input) or not _by_onednn(input, weight, bias):
        return F.linear(input, weight, bias)
    output: Tensor = _FrozenLinear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return output


def product(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, onto: Tensor | None = None
) -> Tensor:
    """x Wᵀ + b, or x Wᵀ added to `onto`, which it returns; to be called `below_autograd`.

    Args:
        input: [..., in]; a matrix beside `onto`.
        weight: [out, in] of any strides: the input's gradient is that of the output times Wᵀ.
        bias: [out], not beside `onto`.
        onto: [rows, out].
    """
    if _by_onednn(input, weight, bias):
        output = _product_by_onednn(input, weight, bias)
        return output if onto is None else onto.add_(output)  # quicker than its own adding
    if onto is not None:
        return onto.addmm_(input, weight.t())
    return F.linear(input, weight, bias)


def rows_of(value: Tensor) -> Tensor:
    """[tokens, features], whatever the leading dimensions."""
    if value.dim() == 2:
        return value
    return value.unsqueeze(0) if value.dim() == 1 else value.flatten(0, -2)


_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


def in_shape_of(input: Tensor, rows: Tensor) -> Tensor:
    """Rows in an input's leading dimensions; not a view, so that they may be written in place."""
    if input.dim() == 2:
        return rows
    return _UNSAFE_VIEW(rows, [*input.shape[:-1], rows.shape[-1]])  # type: ignore[no-any-return]


def _product_by_onednn(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        bias = bias.contiguous()  # it reads no strides of a bias
    return _onednn()(input, weight, bias, "none", [], "")  # type: ignore[no-any-return]


@cache
def _onednn() -> Any:
    """What torch calls it by."""
    return torch.ops.mkldnn._linear_pointwise.default


def _by_onednn(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN is to multiply, which checks less than torch's function does.

    A compiler chooses by itself.
    """
    return bool(
        input.dtype is weight.dtype is torch.float32
        and input.is_cpu
        and weight.is_cpu
        and not torch.compiler.is_compiling()
        and onednn_is_faster()
        and torch.backends.mkldnn.enabled
        and type(weight) in _PLAIN
        and type(input) in _PLAIN
        and input.dim() >= 2
        and weight.dim() == 2
        and input.shape[-1] == weight.shape[1] > 0
        and input.numel() >= _LEAST_ROWS * weight.shape[1]
        and (bias is None or (bias.dtype == weight.dtype and bias.shape == weight.shape[:1]))
    )


@cache
def onednn_is_faster() -> bool:
    """On this machine, for float32: on AMD's processors with AVX-512. Others weren't measured."""
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _native.load_error() is None
        and _native.require().cpu_is_amd()
    )


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        with below_autograd():
            return _product_by_onednn(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return frozen_linear(grad, weight.t()), None, None
