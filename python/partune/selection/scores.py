"""Selections by a score per entry: magnitudes, movement, chance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partune import ops
from partune.selection.protocol import Proposal, Scores, Selection, State, needs_gradient


@dataclass(frozen=True)
class Magnitude(Selection):
    """Select where |W| is largest, or smallest as in SaRA (arXiv 2409.06633).

    Example:
        >>> from partune.selection import topk_csr
        >>> topk_csr(Magnitude(largest=False).propose(torch.tensor([[-3.0, 1.0]]), None, {}), 1)[1]
        tensor([1], dtype=torch.int32)
    """

    largest: bool = True

    def propose(self, weight: Tensor, grad: Tensor | None, state: State) -> Proposal:
        return Scores(weight.abs(), self.largest)


@dataclass(frozen=True)
class GradientMagnitude(Selection):
    """Select where the gradient of the selecting step is largest (or smallest) in magnitude.

    Raises:
        ValueError: no gradient.

    Example:
        >>> from partune.selection import topk_csr
        >>> grad = torch.tensor([[1.0, -2.0]])
        >>> proposal = GradientMagnitude().propose(torch.ones(1, 2), grad, {})
        >>> topk_csr(proposal, 1)[1]
        tensor([1], dtype=torch.int32)
    """

    largest: bool = True

    def propose(self, weight: Tensor, grad: Tensor | None, state: State) -> Proposal:
        return Scores(needs_gradient(self, grad).abs(), self.largest)


@dataclass(frozen=True)
class Movement(Selection):
    """Select where training moves weights away from zero most: the sum over all steps of -g·W.

    Sanh et al., "Movement pruning", arXiv 2005.07683. The sum takes as much memory as the matrix in
    float32; NaN and infinite terms count as 0.

    Raises:
        ValueError: nothing observed yet.

    Example:
        >>> from partune.selection import topk_csr
        >>> movement, weight = Movement(), torch.ones(1, 2)
        >>> state = movement.init(weight)
        >>> movement.observe_(weight, torch.tensor([[1.0, -2.0]]), state)
        >>> topk_csr(movement.propose(weight, None, state), 1)[1]
        tensor([1], dtype=torch.int32)
    """

    largest: bool = True

    def init(self, weight: Tensor) -> State:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return {"movement": torch.zeros_like(weight, dtype=wide), "observations": 0}

    def observe_(self, weight: Tensor, grad: Tensor, state: State) -> None:
        movement = state["movement"]
        moved = weight.to(movement.dtype) * grad.to(movement.dtype)
        movement -= moved.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        state["observations"] += 1

    def propose(self, weight: Tensor, grad: Tensor | None, state: State) -> Proposal:
        if state["observations"] == 0:
            raise ValueError("Movement has observed no gradient yet: let step() select")
        return Scores(state["movement"], self.largest)


@dataclass(frozen=True)
class Random(Selection):
    """Select by chance, differently at every refresh and for every matrix.

    Args:
        seed: the key of the random numbers, which are the same on every device.

    Raises:
        TypeError: a seed that is no int.

    Example:
        >>> state = {"parameter_id": 0, "step": 1}
        >>> Random(seed=1).propose(torch.ones(2, 3), None, state).shape
        (2, 3)
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"seed: got {self.seed!r}, want an int")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}, want 64 bits")

    def propose(self, weight: Tensor, grad: Tensor | None, state: State) -> Proposal:
        seed, step = (torch.tensor(n, device=weight.device) for n in (self.seed, state["step"]))
        parameter_id = state["parameter_id"]
        scores = ops.random_scores(*weight.shape, seed=seed, step=step, parameter_id=parameter_id)
        return Scores(scores)
