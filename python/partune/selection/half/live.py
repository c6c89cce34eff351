"""The live half of one parameter on its device, with the shape of its compact state."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from partune import ops
from partune.ops._half_mask_reference import live_positions
from partune.selection.half.naming import matrix_of
from partune.selection.half.plan import HalfPlan


@dataclass(frozen=True)
class LiveHalf:
    """Rows, columns or elements of a parameter, as `ops.half_adamw_` takes them."""

    level: str
    live: Tensor  # int32: the lines; empty for elements, whose mask is drawn
    ranks: Tensor  # int64: of elements
    mask_id: int
    mask_seed: Tensor
    shape: tuple[int, ...]  # of the state

    def read(self, dense: Tensor) -> Tensor:
        """The live entries of a tensor of the parameter's shape."""
        return dense.reshape(-1)[self.positions(dense.shape)].view(self.shape)

    def spread(self, values: Tensor, dense: Tensor) -> Tensor:
        """A copy of a tensor of the parameter's shape with the live entries replaced."""
        flat = dense.reshape(-1).clone()
        flat[self.positions(dense.shape)] = values.reshape(-1)
        return flat.view(dense.shape)

    def positions(self, shape: torch.Size) -> Tensor:
        """The live entries' places in row-major order."""
        rows, columns = matrix_of(shape, self.level)
        return live_positions(self.level, rows, columns, self.live, self.mask_seed, self.mask_id)

    def mask(self, parameter: Tensor) -> Tensor:
        """The live entries as a bool mask of the parameter's shape."""
        flat = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
        flat[self.positions(parameter.shape)] = True
        return flat.view(parameter.shape)


def live_half(plan: HalfPlan, name: str, parameter: Tensor) -> LiveHalf | None:
    """The live half of a parameter; None where all of it or nothing is live."""
    live = plan.live[name]
    if live.kind in ("all", "none"):
        return None
    device = parameter.device
    seed = torch.full((), plan.half.seed, dtype=torch.int64, device=device)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    rows, columns = matrix_of(parameter.shape, live.kind)
    mask_id = 0 if live.mask_id is None else live.mask_id
    if live.kind == "elements":
        count = math.prod(parameter.shape)
        mask = ops.random_mask(count, mask_seed=seed, mask_id=mask_id)
        ranks = ops.mask_ranks(mask, count)
        shape: tuple[int, ...] = (int(ranks[-1]),)
        return LiveHalf(live.kind, nothing.to(torch.int32), ranks, mask_id, seed, shape)
    lines = live.lines(tuple(parameter.shape), plan.half.seed).to(device)
    shape = (len(lines), columns) if live.kind == "rows" else (rows, len(lines))
    return LiveHalf(live.kind, lines, nothing, mask_id, seed, shape)
