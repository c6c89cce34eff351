"""Inputs for the tests of family half_mask, on any backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from op_cases import CPU
from partune.ops._half_mask_reference import (
    TILE,
    live_positions,
    reference_mask_counts,
    reference_random_mask,
)

LEVELS = ("rows", "columns", "elements", "stored")  # elements with a drawn and with a stored mask
MASK_SEED = 2**40 + 7


@dataclass
class HalfCase:
    """The arguments of one half_adamw_ call over a list of parameters."""

    level: str
    weights: list[Tensor]
    grads: list[Tensor]
    live: list[Tensor]
    ranks: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    masters: list[Tensor]
    steps: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def op_level(self) -> str:
        return "elements" if self.level == "stored" else self.level

    def run(self, op: Any) -> None:
        count = len(self.weights)
        op(
            self.weights, self.grads, self.live, self.ranks, self.exp_avgs, self.exp_avg_sqs,
            self.masters, self.steps, list(range(count)), list(range(5, 5 + count)),
            level=self.op_level, **self.options,
        )  # fmt: skip

    def mutated(self) -> list[Tensor]:
        return [*self.weights, *self.exp_avgs, *self.exp_avg_sqs, *self.masters]

    def copy(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> HalfCase:
        """An independent copy, floating tensors widened to `dtype` where one is given."""

        def clone(values: list[Tensor]) -> list[Tensor]:
            return [
                v.to(device=device, dtype=dtype if v.is_floating_point() else None, copy=True)
                for v in values
            ]

        options = {
            name: value.to(device=device)
            if isinstance(value, Tensor) and value.dtype != torch.float64
            else value
            for name, value in self.options.items()
        }
        steps = [step.to(device=device) for step in self.steps]
        return HalfCase(
            self.level, clone(self.weights), clone(self.grads), clone(self.live),
            clone(self.ranks), clone(self.exp_avgs), clone(self.exp_avg_sqs), clone(self.masters),
            steps, options,
        )  # fmt: skip

    def mask(self, number: int) -> Tensor:
        """Which entries of a matrix are live, on the CPU."""
        weight = self.weights[number]
        flat = live_positions(
            self.op_level, *weight.shape, self.live[number].cpu(), torch.tensor(MASK_SEED),
            5 + number,
        )  # fmt: skip
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[flat] = True
        return mask.view(weight.shape)


def half_case(
    level: str,
    shapes: list[tuple[int, int]],
    dtype: torch.dtype,
    *,
    grad_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
    masters: bool = False,
    device: torch.device = CPU,
    **options: Any,
) -> HalfCase:
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = state_dtype or wide
    case = HalfCase(level, [], [], [], [], [], [], [], [])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for i, (rows, columns) in enumerate(shapes):
        live, ranks, kept = live_half(level, rows, columns, 5 + i, generator)
        case.weights.append(draw(rows, columns).to(dtype))
        case.grads.append(draw(rows, columns).to(grad_dtype or dtype))
        case.live.append(live)
        case.ranks.append(ranks)
        case.exp_avgs.append(draw(*kept).mul(0.1).to(state))
        case.exp_avg_sqs.append(draw(*kept).square().to(state))
        if masters:
            case.masters.append(draw(*kept).float())
        case.steps.append(torch.tensor(float(i + 3)))
    case.options = {
        "lr": torch.tensor(0.05, dtype=torch.float64), "beta1": 0.9, "beta2": 0.95,
        "weight_decay": 0.1, "eps": 1e-6, "eps_mode": "corrected", "maximize": False,
        "rounding": "nearest", "mask_seed": torch.tensor(MASK_SEED),
        "seed": torch.tensor(1234567890123), **options,
    }  # fmt: skip
    return case if device == CPU else case.copy(device=device)


def live_half(
    level: str, rows: int, columns: int, mask_id: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """What tells a random half of a matrix, and the shape of its state."""
    nothing = torch.empty(0, dtype=torch.int64)
    if level in ("rows", "columns"):
        lines = rows if level == "rows" else columns
        live = torch.randperm(lines, generator=generator)[: lines // 2].sort().values.int()
        shape = (len(live), columns) if level == "rows" else (rows, len(live))
        return live, nothing, shape
    count = rows * columns
    mask = reference_random_mask(count, mask_seed=torch.tensor(MASK_SEED), mask_id=mask_id)
    counts = reference_mask_counts(mask, count)
    ranks = torch.zeros(-(-count // TILE) + 1, dtype=torch.int64)
    ranks[1:] = counts.cumsum(0)
    live = mask if level == "stored" else torch.empty(0, dtype=torch.int32)
    return live, ranks, (int(ranks[-1]),)
