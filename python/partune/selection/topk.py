"""The k best entries of a proposal, or those of its best blocks, as a CSR."""

from __future__ import annotations

import torch
from torch import Tensor

from partune import ops
from partune.ops._checks import SIXTEEN_BIT
from partune.ops.csr import Csr, csr_of_blocks
from partune.selection.budget import Block, Layout, check_block
from partune.selection.protocol import Factors, Proposal, Scores

# Entries of a product of factors that are held at a time.
_PANEL_ENTRIES = 2**22


def topk_csr(proposal: Proposal, k: int, *, block: Block = (1, 1)) -> Csr:
    """Select exactly the k best entries of a proposal; ties go to the lower flat index.

    Args:
        k: entries, a multiple of a block's.
        block: rows and columns of what is selected as one, by the sum of its scores: LIFT's block
            variant (arXiv 2506.00772; how it scores a block isn't published). Blocks lie side by
            side from the first entry on, and divide the matrix.

    Returns:
        crow_indices int64 [rows + 1] and col_indices int32 [k].

    Raises:
        TypeError: neither Scores nor Factors, or a dtype that the core does not select from.
        ValueError: a k out of range; blocks that don't divide k or the matrix.

    Example:
        >>> crow_indices, col_indices = topk_csr(Scores(torch.tensor([[3.0, 1.0, 2.0]])), 2)
        >>> col_indices
        tensor([0, 2], dtype=torch.int32)
        >>> topk_csr(Scores(torch.tensor([[3.0, 0.0, 2.0, 2.0]])), 2, block=(1, 2))[1]
        tensor([2, 3], dtype=torch.int32)
    """
    if not isinstance(proposal, Scores | Factors):
        raise TypeError(f"proposal: got {type(proposal).__name__}, want Scores or Factors")
    check_block(block)
    if block != (1, 1):
        return _topk_of_blocks(proposal, k, block)
    if isinstance(proposal, Scores):
        return ops.topk_csr(proposal.values, k, largest=proposal.largest)
    return ops.topk_csr_factors(proposal.left, proposal.right, k)


def _topk_of_blocks(proposal: Proposal, k: int, block: Block) -> Csr:
    rows, columns = proposal.shape
    size = block[0] * block[1]
    Layout(1, rows, columns).check_divided_by(block)
    if k % size:
        raise ValueError(f"k: got {k}, want a multiple of {size}, the entries of a block")
    largest = not isinstance(proposal, Scores) or proposal.largest
    chosen = ops.topk_csr(_block_scores(proposal, block), k // size, largest=largest)
    return csr_of_blocks(*chosen, block)


def _block_scores(proposal: Proposal, block: Block) -> Tensor:
    """The sum of each block's scores, [rows / block, columns / block]."""
    if isinstance(proposal, Scores):
        return _sums(proposal.values, block)
    panel = max(_PANEL_ENTRIES // max(proposal.shape[1], 1) // block[0], 1) * block[0]
    return torch.cat(
        [_sums((rows @ proposal.right).abs_(), block) for rows in torch.split(proposal.left, panel)]
    )


def _sums(scores: Tensor, block: Block) -> Tensor:
    rows, columns = scores.shape
    dtype = torch.float32 if scores.dtype in SIXTEEN_BIT else scores.dtype
    tiles = scores.view(rows // block[0], block[0], columns // block[1], block[1])
    return tiles.sum((1, 3), dtype=dtype)
