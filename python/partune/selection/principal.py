"""Principal weights: the entries that a low-rank approximation of the matrix holds to be large."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from partune.selection.protocol import Factors, Proposal, Scores, Selection, State

_GRAM_CHUNK = 4096  # columns widened at a time
_ONE_THREAD_ROWS = 1024  # up to here a second thread makes LAPACK slower, on a busy CPU 20 times
_FLOAT32_SPREAD = 1e4  # of the squared singular values: beyond it float32 blurs the small ones


@dataclass(frozen=True)
class PrincipalWeights(Selection):
    """Select where |W'| is largest, W' being the best approximation of W of rank `rank`.

    W' is never formed: its factors are the leading eigenvectors of the smaller Gram matrix and W's
    projection on them. float32 suffices unless the largest of the `rank` leading singular values is
    over 100 times the smallest; then the eigenvectors are found in float64. From rank = min(rows,
    columns) on, W' is W.

    Args:
        rank: of the approximation, at least 1. LIFT recommends 128 (arXiv 2506.00772, section 4).

    Raises:
        TypeError: a rank that is no int.
        ValueError: a rank below 1, or a weight with NaN or infinite entries.

    Example:
        >>> from partune.selection import topk_csr
        >>> weight = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]))
        >>> topk_csr(PrincipalWeights(rank=1).propose(weight, None, {}), 1)
        (tensor([0, 0, 1]), tensor([0], dtype=torch.int32))
    """

    rank: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool):
            raise TypeError(f"rank: got {self.rank!r}, want an int")
        if self.rank < 1:
            raise ValueError(f"rank: got {self.rank}, want at least 1")

    def propose(self, weight: Tensor, grad: Tensor | None, state: State) -> Proposal:
        if self.rank >= min(weight.shape):
            return Scores(weight.abs())
        compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
        wide = weight.shape[0] <= weight.shape[1]
        basis = _leading_eigenvectors(weight if wide else weight.T, self.rank).to(compute)
        weight = weight.to(compute)
        return Factors(basis, basis.T @ weight) if wide else Factors(weight @ basis, basis.T)


def _leading_eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    """Those of matrix @ matrix.T, [rows, rank]."""
    for compute in (torch.float32, torch.float64):
        if compute != torch.float64 and matrix.dtype == torch.float64:
            continue
        gram = matrix.new_zeros(matrix.shape[0], matrix.shape[0], dtype=compute)
        for columns in torch.split(matrix, _GRAM_CHUNK, dim=1):
            columns = columns.to(compute)
            gram.addmm_(columns, columns.T)
        if not gram.isfinite().all():
            continue
        with _one_thread(gram):
            values, vectors = torch.linalg.eigh(gram)
        if compute == torch.float64 or values[-rank] * _FLOAT32_SPREAD > values[-1]:
            leading: Tensor = vectors[:, -rank:]
            return leading
    raise ValueError("weight: got NaN or infinite entries, which have no principal weights")


@contextmanager
def _one_thread(gram: Tensor) -> Iterator[None]:
    """Leave a small eigenproblem on the CPU to one thread."""
    threads = torch.get_num_threads()
    alone = gram.device.type == "cpu" and gram.shape[0] <= _ONE_THREAD_ROWS and threads > 1
    try:
        if alone:
            torch.set_num_threads(1)
        yield
    finally:
        if alone:
            torch.set_num_threads(threads)
