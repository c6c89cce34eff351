"""Family select: exactness of the radix selection, and the same bits from everything."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_emulator
from op_cases import GPU, SHAPES, Backend
from partune import _native
from partune.ops._contract import OPS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LARGE = (300, 700)
FACTOR_SHAPES = [(1, 1, 1), (63, 5, 129), (7, 300, 1), (130, 33, 277), (7, 300, 129)]
if cuda_emulator.MODE == "tsan":  # which takes twenty times as long
    LARGE = (50, 270)
    FACTOR_SHAPES = [(1, 1, 1), (3, 5, 129), (3, 100, 1), (66, 17, 130), (5, 70, 9)]
TOPK_REFERENCE = OPS["topk_csr"].reference
Csr = tuple[Tensor, Tensor]


def assert_same_csr(actual: Csr, reference: Csr) -> None:
    assert actual[0].dtype == torch.int64 and actual[1].dtype == torch.int32
    assert torch.equal(actual[0].cpu(), reference[0].cpu())
    assert torch.equal(actual[1].cpu(), reference[1].cpu())


def mask_of(csr: Csr, rows: int, columns: int) -> Tensor:
    crow, col = csr[0].cpu(), csr[1].cpu()
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[torch.repeat_interleave(torch.arange(rows), crow.diff()), col.long()] = True
    return mask


def smaller(backend: Backend, *sizes: int) -> tuple[int, ...]:
    """Sizes that the emulator gets through: a part of what the others take."""
    if backend.name != "cuda-emulated":
        return sizes
    return tuple(-(-size // (3 if cuda_emulator.MODE == "plain" else 8)) for size in sizes)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
def test_topk_csr(
    ops: Any, device: torch.device, shape: tuple[int, int], dtype: torch.dtype, largest: bool
) -> None:
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine = scores.to(device)
    for k in {0, min(1, scores.numel()), scores.numel() // 20, scores.numel()}:
        reference = TOPK_REFERENCE(scores, k, largest=largest)
        assert_same_csr(ops.topk_csr(mine, k, largest=largest), reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_csr_of_an_unaligned_view(ops: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Views that start anywhere in their allocations, and end where these do."""
    scores = torch.randn(37, 131, generator=torch.Generator().manual_seed(1)).to(dtype)
    reference = TOPK_REFERENCE(scores, 500)
    for offset in range(1, 8):
        buffer = torch.cat([torch.full((offset,), 777, dtype=dtype), scores.view(-1)]).to(device)
        assert_same_csr(ops.topk_csr(buffer[offset:].view(37, 131), 500), reference)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_csr_with_ties_nan_inf_and_zeros(
    backend: Backend, dtype: torch.dtype, largest: bool
) -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(-3, 4, smaller(backend, 211, 307), generator=generator).to(dtype)
    flat = scores.view(-1)
    flat[::7] = -0.0
    flat[::11] = float("nan")
    flat[::13] = float("inf")
    flat[::17] = -float("inf")
    mine = scores.to(backend.device)
    for share in (0.0, 0.002, 0.08, 0.3, 0.9, 1.0):
        k = max(1, int(share * scores.numel()))
        reference = TOPK_REFERENCE(scores, k, largest=largest)
        assert_same_csr(backend.ops.topk_csr(mine, k, largest=largest), reference)


def test_topk_csr_of_equal_scores_takes_the_first(backend: Backend) -> None:
    rows, columns = smaller(backend, 500, 300)
    crow, col = backend.ops.topk_csr(
        torch.full((rows, columns), 2.5, device=backend.device), columns + columns // 2
    )
    assert crow[1] == columns and crow[2] == columns + columns // 2
    expected = torch.cat([torch.arange(columns), torch.arange(columns // 2)])
    assert torch.equal(col.cpu(), expected.int())


def test_subnormal_scores_keep_their_order(ops: Any, device: torch.device) -> None:
    scores = torch.arange(1, 4001, dtype=torch.float64).mul(5e-324).view(40, 100)
    single = torch.arange(1, 4001).to(torch.int32).view(torch.float32).view(40, 100)
    for subnormal in (scores, single):
        selected = ops.topk_csr(subnormal.to(device), 700)
        assert mask_of(selected, 40, 100).view(-1)[-700:].all()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_csr(backend: Backend, dtype: torch.dtype, largest: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(smaller(backend, 211, 307), generator=generator).to(dtype)
    scores.view(-1)[::5] = float("nan")
    scores.view(-1)[::7] = 0.002
    scores.view(-1)[::9] = -0.0
    mine = scores.to(backend.device)
    for threshold in (0.002, 0.0, -0.0, scores[0, 1].item(), float("inf"), -float("inf"), 1e300):
        reference = OPS["threshold_csr"].reference(scores, threshold, largest=largest)
        selected = backend.ops.threshold_csr(mine, threshold, largest=largest)
        assert_same_csr(selected, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", FACTOR_SHAPES, ids=str)
def test_factors_are_exact_on_integers(
    ops: Any, device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, rank, columns = shape
    generator = torch.Generator().manual_seed(4)
    left = torch.randint(-8, 9, (rows, rank), generator=generator).to(dtype)
    right = torch.randint(-8, 9, (rank, columns), generator=generator).to(dtype)
    product = (left.double() @ right.double()).abs()
    for k in {0, 1, rows * columns // 20, rows * columns // 2, rows * columns}:
        selected = ops.topk_csr_factors(left.to(device), right.to(device), k)
        assert_same_csr(selected, TOPK_REFERENCE(product, k))


@pytest.mark.parametrize("shape", [(576, 128, 1536), (1000, 33, 777)], ids=str)
def test_factors_are_right_away_from_the_threshold(
    backend: Backend, shape: tuple[int, int, int]
) -> None:
    rows, rank, columns = smaller(backend, *shape)
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(rows, rank, generator=generator)
    right = torch.randn(rank, columns, generator=generator)
    product = (left.double() @ right.double()).abs()
    k = rows * columns // 20
    threshold = product.flatten().topk(k).values[-1]
    factors = left.to(backend.device), right.to(backend.device)
    selected = mask_of(backend.ops.topk_csr_factors(*factors, k), rows, columns)
    assert selected.sum() == k
    clear = (product - threshold).abs() > 1e-5 * threshold
    assert torch.equal(selected[clear], (product >= threshold)[clear])


def test_factors_extra_memory_is_a_small_part_of_the_product() -> None:
    """Measured on a fresh process: at most 5 % of the product that is never held."""
    script = """
import re, torch, partune.ops
def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))
n, rank = 4096, 32
left, right = torch.randn(n, rank), torch.randn(rank, n)
op = torch.ops.partune.topk_csr_factors
op(left[:600], right, 1000)
k = n * n // 20
open("/proc/self/clear_refs", "w").write("5")
before = kib("VmHWM")
csr = op(left, right, k)
result = sum(t.nbytes for t in csr) / 1024
print((kib("VmHWM") - before - result) / (n * n * 4 / 1024))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(run.stdout) <= 0.05, run.stdout


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_same_bits_for_any_number_of_threads(ops: Any) -> None:
    generator = torch.Generator().manual_seed(6)
    left = torch.randn(500, 40, generator=generator)
    right = torch.randn(40, 900, generator=generator)
    seed, step = torch.tensor(5), torch.tensor(9)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            scores = ops.random_scores(500, 900, seed=seed, step=step, parameter_id=3)
            csrs = ops.topk_csr_factors(left, right, 20_000), ops.topk_csr(scores, 20_000)
            results.append((*csrs[0], *csrs[1], scores))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cuda-emulated", GPU], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", FACTOR_SHAPES[2:], ids=str)
def test_factors_have_the_bits_of_the_cpu(
    backend: Backend, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Ranks of scores that differ in their last bits tell how these were rounded."""
    if _native.require().cpu_isa() == "baseline":
        return  # rounds multiply-adds twice
    rows, rank, columns = shape
    generator = torch.Generator().manual_seed(7)
    left = torch.randn(rows, rank, generator=generator).to(dtype)
    right = torch.randn(rank, columns, generator=generator).to(dtype)
    for k in (1, rows * columns // 20, rows * columns // 2):
        mine = backend.ops.topk_csr_factors(left.to(backend.device), right.to(backend.device), k)
        assert_same_csr(mine, torch.ops.partune.topk_csr_factors(left, right, k))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_scores_bit_for_bit(ops: Any, device: torch.device, shape: tuple[int, int]) -> None:
    arguments = {
        "seed": torch.tensor(-(2**45) - 3),
        "step": torch.tensor(2**33 + 7),
    }
    mine = {name: value.to(device) for name, value in arguments.items()}
    scores = ops.random_scores(*shape, **mine, parameter_id=2**32 - 1)
    reference = OPS["random_scores"].reference(*shape, **arguments, parameter_id=2**32 - 1)
    assert torch.equal(scores.cpu(), reference)


@pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)
def test_opcheck(ops: Any, device: torch.device) -> None:
    scores = torch.randn(5, 7, device=device)
    torch.library.opcheck(ops.topk_csr.default, (scores, 4))
    torch.library.opcheck(ops.threshold_csr.default, (scores, 0.5))
    factors = torch.randn(5, 2, device=device), torch.randn(2, 7, device=device)
    torch.library.opcheck(ops.topk_csr_factors.default, (*factors, 4))
    keywords = {
        "seed": torch.tensor(1, device=device),
        "step": torch.tensor(2, device=device),
        "parameter_id": 0,
    }
    torch.library.opcheck(ops.random_scores.default, (5, 7), keywords)
