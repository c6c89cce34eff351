"""Inputs for the ops' tests, on any backend, and how results are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_emulator

CPU = torch.device("cpu")
# max|a - b| <= tolerance · max|reference|
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 1e-3,
}
SHAPES = [(0, 5), (3, 0), (1, 1), (3, 3), (63, 129), (1, 5000), (1000, 3), (129, 1000)]
if cuda_emulator.MODE == "tsan":  # which takes twenty times as long
    SHAPES = [(0, 5), (3, 0), (1, 1), (3, 3), (5, 129), (1, 1100), (130, 3)]


@dataclass(frozen=True)
class Backend:
    """Where a test's ops run: namespace of the ops, and where they want their tensors."""

    name: str
    device: torch.device
    ops: Any


GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def assert_close(actual: Tensor, reference: Tensor, tolerance: float | None = None) -> None:
    """DESIGN's tolerance, on equal shapes and dtypes, wherever they are; NaN equals NaN."""
    assert actual.shape == reference.shape
    assert actual.dtype == reference.dtype
    limit = TOLERANCE[reference.dtype] if tolerance is None else tolerance
    a, b = actual.double().cpu(), reference.double().cpu()
    assert torch.equal(a.isnan(), b.isnan())
    finite = b.isfinite()
    assert torch.equal(a[~finite & ~b.isnan()], b[~finite & ~b.isnan()])
    if finite.any():
        scale = max(b[finite].abs().max().item(), 1e-30)
        error = (a[finite] - b[finite]).abs().max().item()
        assert error <= limit * scale, f"error {error:.3e} exceeds {limit} of {scale:.3e}"


def random_csr(rows: int, columns: int, density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A CSR with about that share of entries, some rows empty."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    if rows > 2:
        mask[rows // 2] = False
    crow = torch.zeros(rows + 1, dtype=torch.int64)
    crow[1:] = mask.sum(1).cumsum(0)
    return crow, mask.nonzero()[:, 1].to(torch.int32)


def embed(value: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The values in another memory layout, and the whole buffer around them, filled with 777."""
    rows, columns = value.shape
    if layout == "contiguous":
        buffer = value.clone()
        return buffer, buffer
    if layout == "unaligned":
        buffer = value.new_full((rows * columns + 7,), 777)
        view = buffer[3 : 3 + rows * columns].view(rows, columns)
    elif layout == "row_strided":
        buffer = value.new_full((rows, columns + 5), 777)
        view = buffer[:, 2 : 2 + columns]
    elif layout == "transposed":
        buffer = value.new_full((columns, rows), 777)
        view = buffer.t()
    else:
        buffer = value.new_full((rows, 2 * columns), 777)
        view = buffer[:, ::2]
    view.copy_(value)
    return view, buffer


LAYOUTS = ["contiguous", "unaligned", "row_strided", "transposed", "column_strided"]


@dataclass
class StepCase:
    """The arguments of one sparse_adamw_ call over a list of parameters."""

    weights: list[Tensor]
    grads: list[Tensor]
    crow: list[Tensor]
    col: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    masters: list[Tensor]
    steps: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, op: Any) -> None:
        op(
            self.weights, self.grads, self.crow, self.col, self.exp_avgs, self.exp_avg_sqs,
            self.masters, self.steps, list(range(len(self.weights))), **self.options,
        )  # fmt: skip

    def mutated(self) -> list[Tensor]:
        return [*self.weights, *self.exp_avgs, *self.exp_avg_sqs, *self.masters]

    def copy(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> StepCase:
        """An independent copy, floating tensors widened to `dtype` where one is given."""

        def clone(values: list[Tensor]) -> list[Tensor]:
            return [
                v.to(device=device, dtype=dtype if v.is_floating_point() else None, copy=True)
                for v in values
            ]

        def move(values: list[Tensor]) -> list[Tensor]:
            return [v.to(device=device) for v in values]

        options = {
            # A float64 learning rate is the host's; whatever else is a tensor lies on the device.
            name: value.to(device=device)
            if isinstance(value, Tensor) and value.dtype != torch.float64
            else value
            for name, value in self.options.items()
        }
        return StepCase(
            clone(self.weights), clone(self.grads), move(self.crow), move(self.col),
            clone(self.exp_avgs), clone(self.exp_avg_sqs), clone(self.masters), move(self.steps),
            options,
        )  # fmt: skip

    def mask(self, number: int) -> Tensor:
        """Which entries of a matrix are selected, on the CPU."""
        crow, col = self.crow[number].cpu(), self.col[number].cpu()
        mask = torch.zeros(self.weights[number].shape, dtype=torch.bool)
        mask[torch.repeat_interleave(torch.arange(crow.numel() - 1), crow.diff()), col.long()] = (
            True
        )
        return mask


def step_case(
    shapes: list[tuple[int, int]],
    dtype: torch.dtype,
    *,
    grad_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
    masters: bool = False,
    compact: bool = False,
    dense: bool = False,
    density: float = 0.2,
    seed: int = 0,
    device: torch.device = CPU,
    **options: Any,
) -> StepCase:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = state_dtype or wide
    case = StepCase([], [], [], [], [], [], [], [])
    for i, (rows, columns) in enumerate(shapes):

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        crow, col = random_csr(rows, columns, density, seed + i)
        nnz: tuple[int, ...] = (col.numel(),)
        if dense:
            crow, col = crow[:0], col[:0]
            nnz = (rows, columns)
        case.weights.append(draw(rows, columns).to(dtype))
        grad_shape = nnz if compact else (rows, columns)
        case.grads.append(draw(*grad_shape).to(grad_dtype or dtype))
        case.crow.append(crow)
        case.col.append(col)
        case.exp_avgs.append(draw(*nnz).mul(0.1).to(state))
        case.exp_avg_sqs.append(draw(*nnz).square().to(state))
        if masters:
            case.masters.append(draw(*nnz).float())
        case.steps.append(torch.tensor(float(i + 3)))
    case.options = {
        "lr": torch.tensor(0.05, dtype=torch.float64),
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.1,
        "eps": 1e-6,
        "eps_mode": "corrected",
        "maximize": False,
        "rounding": "nearest",
        "seed": torch.tensor(1234567890123),
        **options,
    }
    return case if device == CPU else case.copy(device=device)
