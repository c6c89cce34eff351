"""Family sampled_grad as autograd sees it: a frozen linear of which selected entries train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partune.ops._autocast import autocast_dtype, without_autocast
from partune.ops._contract import below_autograd
from partune.ops._saved_input import input_of, saved_of
from partune.ops.csr import Csr, split_csr
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
    blocks: bool = False,
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
        blocks: whether the entries are aligned blocks of 4 by 4, whose gradient takes less time;
            see `partune.ops.sampled_grad_`.
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
        input, [weight], [bias], [values], [(crow_indices, col_indices)], blocks=[blocks],
        transposed=transposed,
    )  # fmt: skip
    return output


def sparse_linears(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    values: Sequence[Tensor],
    csrs: Sequence[Csr],
    *,
    blocks: Sequence[bool],
    transposed: bool = False,
) -> tuple[Tensor, ...]:
    """`sparse_linear` of layers that read one input, such as q, k and v: one node of the graph."""
    _refuse_trained(weights)
    input, weights, biases = _as_autocast(input, weights, biases)
    indices = [tensor for csr in csrs for tensor in csr]
    outputs: tuple[Tensor, ...] = _SparseLinears.apply(  # type: ignore[no-untyped-call]
        transposed, blocks, input, *weights, *biases, *values, *indices
    )
    return outputs


def _refuse_trained(weights: Sequence[Tensor]) -> None:
    if any(weight.requires_grad for weight in weights):
        raise ValueError(
            "weight: got one that requires grad beside values, which are part of it; want a frozen "
            "one, weight.requires_grad_(False)"
        )


def _refuse_second(grads: Sequence[Tensor | None]) -> None:
    if torch.is_grad_enabled() and any(g is not None and g.requires_grad for g in grads):
        raise RuntimeError(
            "sparse_linear has no second derivative; call backward without create_graph=True"
        )


def _as_autocast(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor | None]]:
    """Cast as torch's linear casts under autocast."""
    dtype = autocast_dtype(input)
    if dtype is None:
        return input, weights, biases
    return (
        input.to(dtype),
        [weight.to(dtype) for weight in weights],
        [None if bias is None else bias.to(dtype) for bias in biases],
    )


class _SparseLinears(torch.autograd.Function):
    """Its tensors are weights, biases and values, as many of each, and the CSRs' two of each."""

    @staticmethod
    def forward(
        ctx: Any, transposed: bool, blocks: Sequence[bool], input: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        count = len(tensors) // 5
        weights, biases, values = (tensors[i * count : (i + 1) * count] for i in range(3))
        ctx.transposed, ctx.blocks = transposed, blocks
        ctx.input_shape = input.shape
        ctx.values_dtypes = [value.dtype for value in values]
        ctx.set_materialize_grads(False)
        trains = any(ctx.needs_input_grad[3 + 2 * count : 3 + 3 * count])
        read = saved_of(input) if trains else (None, None)
        ctx.save_for_backward(*read, *weights, *tensors[3 * count :])
        with below_autograd():
            return tuple(
                product(input, weight.t() if transposed else weight, bias)
                for weight, bias in zip(weights, biases, strict=True)
            )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second(grads)
        count, (_, _, of_input, *needed) = len(grads), ctx.needs_input_grad
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
                if of_input:
                    weight = weights[i] if ctx.transposed else weights[i].t()
                    grad_input = product(rows, weight, onto=grad_input)
                if needed[count + i]:
                    grad_biases[i] = rows.sum(0)
                if needed[2 * count + i]:
                    read = rows_of(input_of(first, second)) if read is None else read
                    factors = (read, rows) if ctx.transposed else (rows, read)
                    csr = indices[2 * i : 2 * i + 2]
                    values = sampled_grad_of_layer(*factors, *csr, blocks=ctx.blocks[i])
                    dtype = ctx.values_dtypes[i]
                    grad_values[i] = values if values.dtype == dtype else values.to(dtype)
            if grad_input is not None:
                grad_input = grad_input.view(ctx.input_shape)
        return None, None, grad_input, *nothing, *grad_biases, *grad_values, *nothing, *nothing


def sparse_grouped_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    sizes: list[int],
    *,
    blocks: bool = False,
    transposed: bool = False,
) -> Tensor:
    """`sparse_linear` of stacked matrices, each of which takes some of the rows: experts.

    Differentiable, once, with respect to input, bias and values.

    Args:
        input: [rows, in], those of the first matrix first.
        weight: [matrices, out, in], of the input's dtype; frozen.
        bias: [matrices, out], or None.
        values: [nnz], as many in each matrix.
        crow_indices, col_indices: of the matrices below one another, int64 [matrices·out + 1]
            ([matrices·in + 1] where transposed) and int32 [nnz].
        sizes: how many rows each matrix takes.
        blocks: as for `sparse_linear`.
        transposed: whether the matrices are stored as [in, out].

    Returns:
        [rows, out].

    Raises:
        ValueError: a weight that requires grad; sizes that aren't the input's rows.
        RuntimeError: a second derivative was asked for; shapes that don't multiply.

    Example:
        >>> weight = torch.tensor([[[3.0, 5.0]], [[1.0, 0.0]]])
        >>> crow, col = torch.tensor([0, 1, 2]), torch.tensor([1, 0], dtype=torch.int32)
        >>> values, x = torch.tensor([5.0, 1.0], requires_grad=True), torch.tensor([[1.0, 2.0]])
        >>> y = sparse_grouped_linear(x, weight, None, values, crow, col, [1, 0])
        >>> y.backward()
        >>> y.item(), values.grad
        (13.0, tensor([2., 0.]))
    """
    _refuse_trained([weight])
    if len(sizes) != len(weight) or sum(sizes) != len(input):
        raise ValueError(
            f"sizes: got {sizes}, want {len(weight)} numbers of rows, together the input's "
            f"{len(input)}"
        )
    input, (weight,), (bias,) = _as_autocast(input, [weight], [bias])
    output: Tensor = _SparseGroupedLinear.apply(  # type: ignore[no-untyped-call]
        transposed, blocks, sizes, input, weight, bias, values, crow_indices, col_indices
    )
    return output


class _SparseGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        transposed: bool,
        blocks: bool,
        sizes: list[int],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        crow_indices: Tensor,
        col_indices: Tensor,
    ) -> Tensor:
        ctx.transposed, ctx.blocks, ctx.sizes = transposed, blocks, sizes
        ctx.values_dtype = values.dtype
        ctx.set_materialize_grads(False)
        read = saved_of(input) if ctx.needs_input_grad[6] else (None, None)
        ctx.save_for_backward(*read, weight, crow_indices, col_indices)
        with below_autograd():
            matrices = weight.transpose(1, 2) if transposed else weight
            biases = [None] * len(weight) if bias is None else bias
            return torch.cat(
                [
                    product(rows, matrix, own)
                    for rows, matrix, own in zip(
                        torch.split(input, sizes), matrices, biases, strict=True
                    )
                ]
            )

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second([grad])
        needed = ctx.needs_input_grad
        first, second, weight, crow_indices, col_indices = ctx.saved_tensors
        grad_input = grad_bias = grad_values = None
        with below_autograd(), without_autocast(weight):
            if grad is not None:
                groups = torch.split(grad, ctx.sizes)
                if needed[3]:
                    matrices = weight if ctx.transposed else weight.transpose(1, 2)
                    pairs = zip(groups, matrices, strict=True)
                    grad_input = torch.cat([product(rows, matrix) for rows, matrix in pairs])
                if needed[5]:
                    grad_bias = torch.stack([rows.sum(0) for rows in groups])
                if needed[6]:
                    inputs = torch.split(input_of(first, second), ctx.sizes)
                    factors = (inputs, groups) if ctx.transposed else (groups, inputs)
                    csrs = split_csr(crow_indices, col_indices, len(weight))
                    values = torch.cat(
                        [
                            sampled_grad_of_layer(left, right, *csr, blocks=ctx.blocks)
                            for left, right, csr in zip(*factors, csrs, strict=True)
                        ]
                    )
                    grad_values = values.to(ctx.values_dtype)
        return None, None, None, grad_input, None, grad_bias, grad_values, None, None
