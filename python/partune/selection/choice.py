"""Asking a selection: every matrix of a parameter proposes, and the k best entries are chosen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from partune.ops.csr import stack_csr
from partune.selection.budget import Block, Layout
from partune.selection.protocol import Selection, State
from partune.selection.topk import topk_csr


@dataclass(frozen=True)
class Choice:
    """What a selection chose, not yet in force."""

    crow_indices: Tensor
    col_indices: Tensor
    selection_state: list[State]


def initial_states(
    selection: Selection, parameter: Tensor, layout: Layout, parameter_id: int
) -> list[State]:
    """The selection's own state before the first step; slices count as matrices of their own."""
    return [
        {**selection.init(matrix), "parameter_id": parameter_id + i, "step": 0}
        for i, matrix in enumerate(layout.matrices(parameter))
    ]


def choose(
    selection: Selection,
    parameter: Tensor,
    grad: Tensor | None,
    layout: Layout,
    states: list[State],
    k: int,
    block: Block,
) -> Choice:
    """Select k entries of every slice, as blocks.

    Raises:
        ValueError: a proposal of another shape than the matrix.
    """
    matrices = layout.matrices(parameter)
    slice_grads = layout.matrices(grad) if grad is not None else (None,) * layout.slices
    chosen = []
    for matrix, slice_grad, state in zip(matrices, slice_grads, states, strict=True):
        proposal = selection.propose(matrix, slice_grad, state)
        shape = getattr(proposal, "shape", matrix.shape)
        if tuple(shape) != tuple(matrix.shape):
            raise ValueError(
                f"{type(selection).__name__} proposed scores of shape {tuple(shape)} for a matrix "
                f"of {tuple(matrix.shape)}"
            )
        chosen.append(topk_csr(proposal, k, block=block))
    return Choice(*stack_csr(chosen), states)
