"""Family sampled_grad as autograd sees it: a frozen linear of which selected entries train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partune.ops._autocast import autocast_dtype, without_autocast
from partune.ops._contract import below_autograd
from partune.ops._saved_input import input_of, saved_of
from partune.ops.csr import Csr
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
    (output,) = sparse_linears(
        input, [weight], [bias], [values], [(crow_indices, col_indices)], transposed=transposed
    )
    return output


def sparse_linears(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    values: Sequence[Tensor],
    csrs: Sequence[Csr],
    *,
    transposed: bool = False,
) -> tuple[Tensor, ...]:
    """`sparse_linear` of layers that read one input, such as q, k and v: one node of the graph."""
    if any(weight.requires_grad for weight in weights):
        raise ValueError(
            "weight: got one that requires grad beside values, which are part of it; want a frozen "
            "one, weight.requires_grad_(False)"
        )
    dtype = autocast_dtype(input)
    if dtype is not None:
        input = input.to(dtype)
        weights = [weight.to(dtype) for weight in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    indices = [tensor for csr in csrs for tensor in csr]
    outputs: tuple[Tensor, ...] = _SparseLinears.apply(  # type: ignore[no-untyped-call]
        transposed, input, *weights, *biases, *values, *indices
    )
    return outputs


class _SparseLinears(torch.autograd.Function):
    """Its tensors are weights, biases and values, as many of each, and the CSRs' two of each."""

    @staticmethod
    def forward(ctx: Any, transposed: bool, input: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        count = len(tensors) // 5
        weights, biases, values = (tensors[i * count : (i + 1) * count] for i in range(3))
        ctx.transposed = transposed
        ctx.input_shape = input.shape
        ctx.values_dtypes = [value.dtype for value in values]
        ctx.set_materialize_grads(False)
        trains = any(ctx.needs_input_grad[2 + 2 * count : 2 + 3 * count])
        read = saved_of(input) if trains else (None, None)
        ctx.save_for_backward(*read, *weights, *tensors[3 * count :])
        with below_autograd():
            return tuple(
                product(input, weight.t() if transposed else weight, bias)
                for weight, bias in zip(weights, biases, strict=True)
            )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and any(g is not None and g.requires_grad for g in grads):
            raise RuntimeError(
                "sparse_linear has no second derivative; call backward without create_graph=True"
            )
        count, needed = len(grads), ctx.needs_input_grad
        first, second, *saved = ctx.saved_tensors
        weights, indices = saved[:count], saved[count:]
        nothing: list[Tensor | None] = [None] * count
        grad_input, grad_biases, grad_values = None, nothing.copy(), nothing.copy()
        read: Tensor | None = None  # as rows
        with below_autograd(), without_autocast(weights[0]):
            for i, grad in enumerate(grads):
                if grad is None:
                    continue
                rows = rows_of(grad)
                if needed[1]:
                    weight = weights[i] if ctx.transposed else weights[i].t()
                    grad_input = product(rows, weight, onto=grad_input)
                if needed[2 + count + i]:
                    grad_biases[i] = rows.sum(0)
                if needed[2 + 2 * count + i]:
                    read = rows_of(input_of(first, second)) if read is None else read
                    factors = (read, rows) if ctx.transposed else (rows, read)
                    values = sampled_grad_of_layer(*factors, *indices[2 * i : 2 * i + 2])
                    dtype = ctx.values_dtypes[i]
                    grad_values[i] = values if values.dtype == dtype else values.to(dtype)
            if grad_input is not None:
                grad_input = grad_input.view(ctx.input_shape)
        return None, grad_input, *nothing, *grad_biases, *grad_values, *nothing, *nothing
