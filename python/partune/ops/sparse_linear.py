"""Family sampled_grad as autograd sees it: a frozen linear of which selected entries train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partune.ops._autocast import autocast_dtype, without_autocast
from partune.ops._saved_input import input_of, saved_of
from partune.ops.frozen_linear import product, rows_of
from partune.ops.sampled_grad import sampled_grad_of_layer


def sparse_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    transposed: bool = False,
) -> Tensor:
    """Run a frozen linear layer whose selected entries train as a vector: y = x Wᵀ + b.

    The weight is read as it is: it has to hold the values already. Their gradient is that of the
    weight at the entries of the CSR, formed there alone. Differentiable, once, with respect to
    input, bias and values; saved for that are the input, the weight and the CSR (of an input that
    is a product its factors, where autograd keeps them anyway). Under autocast input, weight and
    bias are cast as torch's linear casts them.

    Args:
        input: float64, float32, bfloat16 or float16, [..., in].
        weight: [out, in], of the input's dtype; frozen, so it may not require grad.
        bias: [out], or None.
        values: [nnz], floating point; only its gradient counts here.
        crow_indices, col_indices: int64 [rows + 1] and int32 [nnz], of the weight as it is stored.
        transposed: whether the weight is stored as [in, out], as GPT-2's Conv1D has it.

    Returns:
        [..., out].

    Raises:
        ValueError: a weight that requires grad.
        RuntimeError: a second derivative was asked for; shapes that don't multiply.

    Example:
        >>> weight = torch.tensor([[3.0, 5.0]])
        >>> crow, col = torch.tensor([0, 1]), torch.tensor([1], dtype=torch.int32)
        >>> values = torch.tensor([5.0], requires_grad=True)
        >>> y = sparse_linear(torch.tensor([[1.0, 2.0]]), weight, None, values, crow, col)
        >>> y.backward()
        >>> y.item(), values.grad
        (13.0, tensor([2.]))
    """
    if weight.requires_grad:
        raise ValueError(
            "weight: got one that requires grad beside values, which are part of it; want a frozen "
            "one, weight.requires_grad_(False)"
        )
    dtype = autocast_dtype(input)
    if dtype is not None:
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    output: Tensor = _SparseLinear.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, values, crow_indices, col_indices, transposed
    )
    return output


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        crow_indices: Tensor,
        col_indices: Tensor,
        transposed: bool,
    ) -> Tensor:
        ctx.transposed = transposed
        ctx.values_dtype = values.dtype
        read = saved_of(input) if ctx.needs_input_grad[3] else (None, None)
        ctx.save_for_backward(*read, weight, crow_indices, col_indices)
        return product(input, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and grad.requires_grad:
            raise RuntimeError(
                "sparse_linear has no second derivative; call backward without create_graph=True"
            )
        *read, weight, crow_indices, col_indices = ctx.saved_tensors
        grad_input = grad_bias = grad_values = None
        with without_autocast(grad):
            if ctx.needs_input_grad[0]:
                grad_input = product(grad, weight if ctx.transposed else weight.t())
            rows = rows_of(grad)
            if ctx.needs_input_grad[2]:
                grad_bias = rows.sum(0)
            if ctx.needs_input_grad[3]:
                factors = (rows, rows_of(input_of(*read)))
                left, right = factors[::-1] if ctx.transposed else factors
                grad_values = sampled_grad_of_layer(left, right, crow_indices, col_indices)
                if grad_values.dtype != ctx.values_dtype:
                    grad_values = grad_values.to(ctx.values_dtype)
        return grad_input, None, grad_bias, grad_values, None, None, None
