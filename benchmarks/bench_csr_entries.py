"""Family csr_entries beside torch's scatter and gather by flat indices, and a copy's bandwidth.

Torch's side forms the flat indices anew, which to keep would take 8 bytes of memory per entry.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench_sparse_adamw import SMOLLM2, lines_touched, principal_like_csr
from torch import nn

from conftest import SHARE_OF_BAR, Comparison, copy_bandwidth
from partune.nn import SparseLinear
from partune.nn._sparse_writing import _after_step
from partune.ops.csr import flat_indices
from partune.selection import Magnitude

GATHER = torch.ops.partune.gather_csr_.default
SCATTER = torch.ops.partune.scatter_csr_.default
BARS = {"torch": 1.5 * SHARE_OF_BAR}
# The linear layers of a 47 M Llama, of SmolLM2-135M, and one of a large model.
SHAPES = {"llama_47m": SMOLLM2 * 12, "smollm2_135m": SMOLLM2 * 30, "4096": [(4096, 4096)]}
CASES = [
    ("llama_47m", torch.float32),
    ("smollm2_135m", torch.float32),
    ("llama_47m", torch.bfloat16),
    ("4096", torch.float32),
    ("4096", torch.bfloat16),
]


class Matrices:
    """Matrices with a selection of 5 %, and float32 values beside them."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        shapes = SHAPES[name]
        csrs = [principal_like_csr(*shape, seed=i) for i, shape in enumerate(shapes)]
        self.crow, self.col = (list(part) for part in zip(*csrs, strict=True))
        self.matrices = [torch.randn(shape, dtype=dtype) for shape in shapes]
        self.values = [torch.randn(col.numel()) for col in self.col]
        self.lines = sum(
            lines_touched(csr, s[1], dtype) for csr, s in zip(csrs, shapes, strict=True)
        )
        self.entries = sum(col.numel() for col in self.col)

    def scatter(self) -> None:
        SCATTER(self.matrices, self.values, self.crow, self.col)

    def gather(self) -> None:
        GATHER(self.values, self.matrices, self.crow, self.col)

    def scatter_by_torch(self) -> None:
        for matrix, values, crow, col in zip(
            self.matrices, self.values, self.crow, self.col, strict=True
        ):
            flat = flat_indices(crow, col, matrix.shape[1])
            matrix.view(-1).scatter_(0, flat, values.to(matrix.dtype))

    def gather_by_torch(self) -> None:
        for matrix, values, crow, col in zip(
            self.matrices, self.values, self.crow, self.col, strict=True
        ):
            flat = flat_indices(crow, col, matrix.shape[1])
            values.copy_(matrix.view(-1).gather(0, flat))


def compare(ours: Callable[[], object], torchs: Callable[[], object]) -> Comparison:
    return Comparison({"ours": ours, "torch": torchs, "copy": copy_bandwidth()})


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_scatter_csr_(report, name: str, dtype: torch.dtype) -> None:
    matrices = Matrices(name, dtype)
    bytes_moved = 2 * 64 * matrices.lines + 8 * matrices.entries
    report(compare(matrices.scatter, matrices.scatter_by_torch), BARS, bytes_moved)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_gather_csr_(report, name: str, dtype: torch.dtype) -> None:
    matrices = Matrices(name, dtype)
    bytes_moved = 64 * matrices.lines + 8 * matrices.entries
    report(compare(matrices.gather, matrices.gather_by_torch), BARS, bytes_moved)


@pytest.mark.parametrize("name", ["llama_47m", "smollm2_135m"])
def test_after_a_step(report, name: str) -> None:
    """What every step of an optimizer adds to that of a model's sparse layers."""
    matrices = Matrices(name, torch.float32)
    layers = []
    for matrix, values, crow, col in zip(
        matrices.matrices, matrices.values, matrices.crow, matrices.col, strict=True
    ):
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(matrix)
        layer = SparseLinear.from_linear(linear, selection=Magnitude(), density=0.05)
        layer.adapter.crow_indices, layer.adapter.col_indices = crow, col
        layer.adapter.values.data.copy_(values)
        layers.append(layer)
    optimizer = torch.optim.SGD([layer.adapter.values for layer in layers])
    comparison = compare(lambda: _after_step(optimizer, (), {}), matrices.scatter_by_torch)
    report(comparison, BARS, 2 * 64 * matrices.lines + 8 * matrices.entries)
