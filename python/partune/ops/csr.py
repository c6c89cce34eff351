"""The indices of a selection: a CSR per matrix, ascending and row-major."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from partune.ops import _checks as check

Csr: TypeAlias = tuple[Tensor, Tensor]


def validate_csr(crow_indices: Tensor, col_indices: Tensor, rows: int, columns: int) -> None:
    """Check everything that step kernels later trust about a CSR.

    Args:
        crow_indices: int64 [rows + 1].
        col_indices: int32 [nnz], strictly ascending within each row.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, row bounds that do not ascend from 0 to nnz, columns out of
            range, unsorted or repeated.

    Example:
        >>> crow_indices, col_indices = csr_from_mask(torch.eye(2, dtype=torch.bool))
        >>> validate_csr(crow_indices, col_indices, rows=2, columns=2)
    """
    check.tensor("crow_indices", crow_indices, None)
    check.tensor("col_indices", col_indices, crow_indices.device)
    check.csr(crow_indices, col_indices)
    check.shape("crow_indices", crow_indices, (rows + 1,))
    nnz = col_indices.numel()
    first, last = int(crow_indices[0]), int(crow_indices[-1])
    if (first, last) != (0, nnz) or bool((crow_indices.diff() < 0).any()):
        raise ValueError(
            f"crow_indices: got bounds from {first} to {last}, want them ascending from 0 "
            f"to {nnz}, the number of col_indices"
        )
    if nnz == 0:
        return
    lowest, highest = int(col_indices.min()), int(col_indices.max())
    if lowest < 0 or highest >= columns:
        raise ValueError(
            f"col_indices: got columns from {lowest} to {highest}, want 0 <= column < {columns}"
        )
    same_row = row_indices(crow_indices).diff() == 0
    if bool((same_row & (col_indices.diff() <= 0)).any()):
        raise ValueError(
            "col_indices: got unsorted or repeated columns, want them ascending per row"
        )


def validate_blocks(crow_indices: Tensor, col_indices: Tensor, block: tuple[int, int]) -> None:
    """Check that the entries of a valid CSR come as whole blocks, side by side from 0 on.

    Args:
        block: rows and columns of one.

    Raises:
        ValueError: entries that don't.

    Example:
        >>> crow_indices, col_indices = csr_from_mask(torch.ones(2, 4, dtype=torch.bool))
        >>> validate_blocks(crow_indices, col_indices, (2, 2))
    """
    rows, columns = block
    firsts = row_indices(crow_indices, col_indices.numel()) % rows == 0  # in blocks' first rows
    blocks = crow_indices[::rows] // (rows * columns), col_indices[firsts][::columns] // columns
    whole = (crow_indices.numel() - 1) % rows == 0 and int(blocks[0][-1]) == blocks[1].numel()
    if whole:
        crow, col = csr_of_blocks(*blocks, block)
        whole = torch.equal(crow, crow_indices) and torch.equal(col, col_indices)
    if not whole:
        raise ValueError(
            f"col_indices: got entries that are no blocks of {rows}x{columns}, want those of a "
            "selection by blocks"
        )


def row_indices(crow_indices: Tensor, nnz: int | None = None) -> Tensor:
    """The row of every entry, int64 [nnz]; given nnz, without waiting for a device."""
    rows = torch.arange(crow_indices.numel() - 1, device=crow_indices.device)
    return rows.repeat_interleave(crow_indices.diff(), output_size=nnz)


def flat_indices(crow_indices: Tensor, col_indices: Tensor, columns: int) -> Tensor:
    """row·columns + column of every entry, int64 [nnz], ascending."""
    starts = torch.arange(crow_indices.numel() - 1, device=crow_indices.device) * columns
    flat = starts.repeat_interleave(crow_indices.diff(), output_size=col_indices.numel())
    return flat.add_(col_indices)


def csr_from_flat(flat: Tensor, rows: int, columns: int) -> Csr:
    """The CSR of ascending flat indices."""
    per_row = torch.bincount(flat // max(columns, 1), minlength=rows)
    crow_indices = torch.zeros(rows + 1, dtype=torch.int64, device=flat.device)
    torch.cumsum(per_row, 0, out=crow_indices[1:])
    return crow_indices, (flat % max(columns, 1)).to(torch.int32)


def csr_from_mask(mask: Tensor) -> Csr:
    """The CSR of a bool mask [rows, columns]."""
    rows, columns = mask.shape
    return csr_from_flat(mask.flatten().nonzero().flatten(), rows, columns)


def mask_from_csr(crow_indices: Tensor, col_indices: Tensor, columns: int) -> Tensor:
    """The bool mask [rows, columns] of a CSR."""
    rows = crow_indices.numel() - 1
    mask = torch.zeros(rows * columns, dtype=torch.bool, device=crow_indices.device)
    mask[flat_indices(crow_indices, col_indices, columns)] = True
    return mask.view(rows, columns)


def stack_csr(slices: Sequence[Csr]) -> Csr:
    """One CSR of slices [rows, columns] stacked to [slices·rows, columns]."""
    if len(slices) == 1:
        return slices[0]
    crow_indices, start = [slices[0][0][:1]], 0
    for crow, col in slices:
        crow_indices.append(crow[1:] + start)
        start += col.numel()
    return torch.cat(crow_indices), torch.cat([col for _, col in slices])


def split_csr(crow_indices: Tensor, col_indices: Tensor, slices: int) -> list[Csr]:
    """The CSRs that `stack_csr` stacked, of as many entries each."""
    rows = (crow_indices.numel() - 1) // slices
    cols = col_indices.view(slices, -1).unbind()
    return [
        (crow_indices[i * rows : (i + 1) * rows + 1] - i * col.numel(), col)
        for i, col in enumerate(cols)
    ]


def csr_of_blocks(crow_indices: Tensor, col_indices: Tensor, block: tuple[int, int]) -> Csr:
    """The entries' CSR of a CSR that names blocks."""
    lengths = (crow_indices.diff() * block[1]).repeat_interleave(block[0])
    crow = torch.cat([crow_indices[:1], lengths.cumsum(0)])
    rows = row_indices(crow, col_indices.numel() * block[0] * block[1])
    places = torch.arange(rows.numel(), device=rows.device) - crow[rows]  # in their rows
    blocks = crow_indices[rows // block[0]] + places // block[1]
    return crow, (col_indices[blocks] * block[1] + places % block[1]).to(torch.int32)
