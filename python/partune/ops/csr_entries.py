"""Family csr_entries: the entries of a CSR, from matrices into vectors and back.

What cuSPARSE calls gather and scatter, for a list of matrices in one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partune.ops import _checks as check
from partune.ops._contract import Op, call, register
from partune.ops.csr import row_indices


def gather_csr_(
    values: Sequence[Tensor],
    matrices: Sequence[Tensor],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
) -> None:
    """Read the entries of a list of matrices that their CSRs name into vectors.

    Args:
        values: [nnz] each, contiguous, of its matrix's dtype, or float32 beside bfloat16 and
            float16; written, bit for bit.
        matrices: [rows, columns] each, with any strides, of float64, float32, bfloat16 or float16.
        crow_indices, col_indices: int64 [rows + 1] and int32 [nnz], ascending and row-major.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong length, shape, stride or device.

    Example:
        >>> values, matrix = torch.zeros(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> crow, col = torch.tensor([0, 1, 2]), torch.tensor([1, 0], dtype=torch.int32)
        >>> gather_csr_([values], [matrix], [crow], [col])
        >>> values
        tensor([2., 3.])
    """
    call("gather_csr_", values, matrices, crow_indices, col_indices)


def scatter_csr_(
    matrices: Sequence[Tensor],
    values: Sequence[Tensor],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
) -> None:
    """Write vectors into the entries of a list of matrices that their CSRs name.

    Args:
        matrices: [rows, columns] each, with any strides, of float64, float32, bfloat16 or float16;
            other entries stay as they are. No two may share an entry that is written.
        values: [nnz] each, contiguous, of its matrix's dtype, which is copied bit for bit, or
            float32 beside bfloat16 and float16, which is rounded to nearest, ties to even.
        crow_indices, col_indices: int64 [rows + 1] and int32 [nnz], ascending and row-major.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong length, shape, stride or device.

    Example:
        >>> matrix, values = torch.zeros(2, 2), torch.tensor([5.0, 7.0])
        >>> crow, col = torch.tensor([0, 1, 2]), torch.tensor([1, 0], dtype=torch.int32)
        >>> scatter_csr_([matrix], [values], [crow], [col])
        >>> matrix
        tensor([[0., 5.],
                [7., 0.]])
    """
    call("scatter_csr_", matrices, values, crow_indices, col_indices)


def gather_csr(
    matrix: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Read the entries of one matrix that a CSR names: `gather_csr_` into a new vector.

    Args:
        matrix, crow_indices, col_indices: as for `gather_csr_`.
        dtype: of the vector; the matrix's if None.

    Returns:
        [nnz].

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device.

    Example:
        >>> matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
        >>> crow, col = torch.tensor([0, 1, 2]), torch.tensor([1, 0], dtype=torch.int32)
        >>> gather_csr(matrix, crow, col, dtype=torch.float32)
        tensor([2., 3.])
    """
    check.tensor("matrix", matrix, None)
    check.tensor("col_indices", col_indices, matrix.device)
    values = matrix.new_empty(col_indices.shape, dtype=dtype or matrix.dtype)
    gather_csr_([values], [matrix], [crow_indices], [col_indices])
    return values


def check_gather_csr_(
    values: Sequence[Tensor],
    matrices: Sequence[Tensor],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
) -> None:
    first = matrices[0] if isinstance(matrices, list | tuple) and matrices else None
    check.tensors("matrices", matrices, first.device if isinstance(first, Tensor) else None)
    device = matrices[0].device if matrices else None
    for name, tensors in (
        ("values", values),
        ("crow_indices", crow_indices),
        ("col_indices", col_indices),
    ):
        check.tensors(name, tensors, device)
        check.length(name, tensors, len(matrices))
    for i, matrix in enumerate(matrices):
        _check_entries(i, matrix, values[i], crow_indices[i], col_indices[i])


def check_scatter_csr_(
    matrices: Sequence[Tensor],
    values: Sequence[Tensor],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
) -> None:
    check_gather_csr_(values, matrices, crow_indices, col_indices)
    for i, matrix in enumerate(matrices):
        strides = matrix.stride()
        if 0 in strides and any(matrix.shape[d] > 1 and strides[d] == 0 for d in (0, 1)):
            raise ValueError(
                f"matrices[{i}]: got strides {strides} for shape {tuple(matrix.shape)}, "
                "want entries that don't share memory"
            )


def _check_entries(
    i: int, matrix: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor
) -> None:
    check.dtype("matrices", matrix, check.FLOATING, i)
    if values.dtype is not matrix.dtype:
        wide = (torch.float32,) if matrix.dtype in check.SIXTEEN_BIT else ()
        check.dtype("values", values, (matrix.dtype, *wide), i)
    if matrix.dim() != 2:
        raise ValueError(
            f"matrices[{i}]: got shape {tuple(matrix.shape)}, want a matrix, [rows, columns]"
        )
    check.csr(crow_indices, col_indices, i)
    check.shape("crow_indices", crow_indices, (matrix.shape[0] + 1,), i)
    if col_indices.numel() > matrix.numel():
        raise ValueError(
            f"col_indices[{i}]: got {col_indices.numel()} entries, want at most {matrix.numel()}"
        )
    check.shape("values", values, col_indices.shape, i)
    check.contiguous("values", values, i)


def _fake_nothing(*args: object, **kwargs: object) -> None:
    """A kernel that only writes into its arguments."""


def reference_gather_csr_(
    values: Sequence[Tensor],
    matrices: Sequence[Tensor],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
) -> None:
    for value, matrix, crow, col in zip(values, matrices, crow_indices, col_indices, strict=True):
        value.copy_(matrix[row_indices(crow, col.numel()), col.to(torch.int64)])


def reference_scatter_csr_(
    matrices: Sequence[Tensor],
    values: Sequence[Tensor],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
) -> None:
    for matrix, value, crow, col in zip(matrices, values, crow_indices, col_indices, strict=True):
        matrix[row_indices(crow, col.numel()), col.to(torch.int64)] = value.to(matrix.dtype)


for _function, _check, _reference in (
    (gather_csr_, check_gather_csr_, reference_gather_csr_),
    (scatter_csr_, check_scatter_csr_, reference_scatter_csr_),
):
    register(Op(_function.__name__, "csr_entries", _function, _check, _fake_nothing, _reference))
