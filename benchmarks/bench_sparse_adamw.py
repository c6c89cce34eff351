"""Family sparse_adamw beside torch's fused AdamW, boolean-mask indexing and a copy's bandwidth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conftest import SHARE_OF_BAR, Comparison, copy_bandwidth
from partune.optim import SparseAdamW
from partune.selection import Magnitude

STEP = torch.ops.partune.sparse_adamw_.default
FOUND_INF = torch.ops.partune.found_inf_.default
REMAP = torch.ops.partune.remap_.default
N, DENSITY = 4096, 0.05
SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def principal_like_factors(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors whose product is as skewed as a pretrained model's matrix.

    Rows and columns are scaled log-normally (sigma 0.2): the principal 5 % touch 47 % of the
    64-byte lines here, 46 % in a mean over SmolLM2's matrices; uniform entries would touch 56 %.
    """
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, 32, generator=generator)
    left *= torch.randn(rows, 1, generator=generator).mul(0.2).exp()
    right = torch.randn(32, columns, generator=generator)
    right *= torch.randn(1, columns, generator=generator).mul(0.2).exp()
    return left, right


def principal_like_csr(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """LIFT's selection of such a matrix."""
    k = int(DENSITY * rows * columns)
    return torch.ops.partune.topk_csr_factors(*principal_like_factors(rows, columns, seed), k)


def uniform_csr(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    scores = torch.ops.partune.random_scores(
        rows, columns, seed=torch.tensor(seed), step=torch.tensor(0), parameter_id=0
    )
    return torch.ops.partune.topk_csr(scores, int(DENSITY * rows * columns))


def lines_touched(csr: tuple[Tensor, Tensor], columns: int, dtype: torch.dtype) -> int:
    crow, col = csr
    rows = torch.repeat_interleave(torch.arange(crow.numel() - 1), crow.diff())
    return ((rows * columns + col) // (64 // dtype.itemsize)).unique().numel()


class Matrices:
    """Parameters with a selection and compact state, and torch's fused AdamW on equal ones."""

    def __init__(self, shapes, dtype, csr=principal_like_csr, compact=False, master=False):
        self.csr = [csr(*shape, seed=i) for i, shape in enumerate(shapes)]
        self.weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
        counts = [col.numel() for _, col in self.csr]
        self.dense_grads = [torch.randn(shape, dtype=dtype) for shape in shapes]
        self.grads = [torch.randn(n, dtype=dtype) for n in counts] if compact else self.dense_grads
        self.exp_avgs = [torch.zeros(n) for n in counts]
        self.exp_avg_sqs = [torch.zeros(n) for n in counts]
        self.masters = [torch.randn(n) for n in counts] if master else []
        self.steps = [torch.tensor(5.0) for _ in shapes]
        self.options = {
            "lr": torch.tensor(1e-4), "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.01,
            "eps": 1e-6, "eps_mode": "uncorrected", "maximize": False, "rounding": "stochastic",
            "seed": torch.tensor(0),
        }  # fmt: skip
        lines = sum(
            lines_touched(csr, shape[1], dtype) for csr, shape in zip(self.csr, shapes, strict=True)
        )
        scattered = (2 if compact else 3) * 64 * lines
        per_entry = 4 + 16 + (dtype.itemsize if compact else 0) + (8 if master else 0)
        self.bytes_moved = scattered + per_entry * sum(counts)

    def step(self) -> None:
        STEP(
            self.weights, self.grads, [crow for crow, _ in self.csr], [col for _, col in self.csr],
            self.exp_avgs, self.exp_avg_sqs, self.masters, self.steps,
            list(range(len(self.weights))), **self.options,
        )  # fmt: skip

    def fused(self) -> Callable[[], object]:
        parameters = [torch.nn.Parameter(weight.clone()) for weight in self.weights]
        for parameter, grad in zip(parameters, self.dense_grads, strict=True):
            parameter.grad = grad
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        return optimizer.step

    def boolean_mask(self) -> Callable[[], object]:
        """What the published code does: a mask per matrix, indexed at each step."""
        weight, grad = self.weights[0].clone(), self.dense_grads[0]
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        crow, col = self.csr[0]
        mask[torch.repeat_interleave(torch.arange(mask.shape[0]), crow.diff()), col.long()] = True
        m, v = torch.zeros(col.numel()), torch.zeros(col.numel())

        def step() -> None:
            g = grad[mask].float()
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.95).addcmul_(g, g, value=0.05)
            values = weight[mask].float().addcdiv_(m, v.sqrt().add_(1e-6), value=-1e-4)
            weight[mask] = values.to(weight.dtype)

        return step


def compare(matrices: Matrices, *, mask: bool = True) -> Comparison:
    functions = {
        "ours": matrices.step,
        "fused": matrices.fused(),
        "copy": copy_bandwidth(),
    }
    if mask:
        functions["mask"] = matrices.boolean_mask()
    return Comparison(functions)


@pytest.mark.parametrize(
    ("dtype", "master", "bar"),
    [(torch.float32, False, 2.5), (torch.bfloat16, False, 1.8), (torch.bfloat16, True, 1.8)],
    ids=["float32", "bfloat16", "bfloat16_master"],
)
def test_dense_gradient_4096(report, dtype: torch.dtype, master: bool, bar: float) -> None:
    matrices = Matrices([(N, N)], dtype, master=master)
    bars = {"fused": bar * SHARE_OF_BAR, "mask": 15 * SHARE_OF_BAR}
    report(compare(matrices), bars, matrices.bytes_moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dense_gradient_4096_uniform_entries(report, dtype: torch.dtype) -> None:
    """No bar: the worst case of scattered memory."""
    matrices = Matrices([(N, N)], dtype, uniform_csr)
    report(compare(matrices), {"fused": 0, "mask": 0}, matrices.bytes_moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compact_gradient_4096(report, dtype: torch.dtype) -> None:
    matrices = Matrices([(N, N)], dtype, compact=True)
    bar = 4.0 if dtype == torch.float32 else 0.0
    comparison = compare(matrices, mask=False)
    report(comparison, {"fused": bar * SHARE_OF_BAR}, matrices.bytes_moved)


def test_210_matrices_of_smollm2(report) -> None:
    matrices = Matrices(SMOLLM2 * 30, torch.float32)
    bars = {"fused": 2.5 * SHARE_OF_BAR}
    report(compare(matrices, mask=False), bars, matrices.bytes_moved)


def test_210_matrices_of_smollm2_through_the_optimizer(report) -> None:
    """The same step as a training script takes it, with the Python around the op."""
    matrices = Matrices(SMOLLM2 * 30, torch.float32)
    parameters = [
        torch.nn.Parameter(torch.matmul(*principal_like_factors(*shape, seed=i)))
        for i, shape in enumerate(SMOLLM2 * 30)
    ]
    for parameter, grad in zip(parameters, matrices.dense_grads, strict=True):
        parameter.grad = grad
    optimizer = SparseAdamW(parameters, lr=1e-4, selection=Magnitude(), refresh_interval=None)
    functions = {"ours": optimizer.step, "fused": matrices.fused(), "copy": copy_bandwidth()}
    report(Comparison(functions), {"fused": 2.5 * SHARE_OF_BAR})


def test_found_inf(report) -> None:
    """The check that skip_nonfinite adds to a step, beside the step."""
    matrices = Matrices([(N, N)], torch.float32)
    crow, col = [list(part) for part in zip(*matrices.csr, strict=True)]
    flag = torch.tensor(0.0)
    functions = {
        "ours": lambda: FOUND_INF(flag, matrices.grads, crow, col),
        "dense isfinite": lambda: matrices.grads[0].isfinite().all(),
        "copy": copy_bandwidth(),
    }
    lines = lines_touched(matrices.csr[0], N, torch.float32)
    bytes_moved = 64 * lines + 4 * col[0].numel()
    report(Comparison(functions), {"dense isfinite": 1.0 * SHARE_OF_BAR}, bytes_moved)


def test_remap(report) -> None:
    """Two moments carried to a selection that keeps most entries, beside torch's own set logic."""
    old, new = principal_like_csr(N, N, 0), principal_like_csr(N, N, 0)
    new = (new[0], new[1].clone())
    values = [torch.randn(old[1].numel()) for _ in range(2)]
    out = [torch.zeros(new[1].numel()) for _ in range(2)]

    def flat(csr: tuple[Tensor, Tensor]) -> Tensor:
        rows = torch.repeat_interleave(torch.arange(N), csr[0].diff())
        return rows * N + csr[1]

    def searchsorted() -> None:
        before, after = flat(old), flat(new)
        place = torch.searchsorted(before, after).clamp_(max=before.numel() - 1)
        both = before[place] == after
        for target, source in zip(out, values, strict=True):
            target[both] = source[place[both]]

    functions = {
        "ours": lambda: REMAP(out, values, *old, *new),
        "searchsorted": searchsorted,
        "copy": copy_bandwidth(),
    }
    bytes_moved = (2 * 4 + 2 * 8) * old[1].numel()
    report(Comparison(functions), {"searchsorted": 2.0 * SHARE_OF_BAR}, bytes_moved)
