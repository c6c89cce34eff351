"""Family select: exactness of the radix selection, and the same bits from everything."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from op_cases import SHAPES
from partune.ops._contract import OPS

TOPK = torch.ops.partune.topk_csr.default
THRESHOLD = torch.ops.partune.threshold_csr.default
FACTORS = torch.ops.partune.topk_csr_factors.default
RANDOM = torch.ops.partune.random_scores.default
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def assert_same_csr(actual: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> None:
    assert actual[0].dtype == torch.int64 and actual[1].dtype == torch.int32
    assert torch.equal(actual[0], reference[0])
    assert torch.equal(actual[1], reference[1])


def mask_of(csr: tuple[Tensor, Tensor], rows: int, columns: int) -> Tensor:
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[torch.repeat_interleave(torch.arange(rows), csr[0].diff()), csr[1].long()] = True
    return mask


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 700)], ids=str)
def test_topk_csr(shape: tuple[int, int], dtype: torch.dtype, largest: bool) -> None:
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for k in {0, min(1, scores.numel()), scores.numel() // 20, scores.numel()}:
        reference = OPS["topk_csr"].reference(scores, k, largest=largest)
        assert_same_csr(TOPK(scores, k, largest=largest), reference)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_csr_with_ties_nan_inf_and_zeros(dtype: torch.dtype, largest: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(-3, 4, (211, 307), generator=generator).to(dtype)
    flat = scores.view(-1)
    flat[::7] = -0.0
    flat[::11] = float("nan")
    flat[::13] = float("inf")
    flat[::17] = -float("inf")
    for k in (1, 100, 5000, 20_000, 60_000, scores.numel()):
        reference = OPS["topk_csr"].reference(scores, k, largest=largest)
        assert_same_csr(TOPK(scores, k, largest=largest), reference)


def test_topk_csr_of_equal_scores_takes_the_first() -> None:
    crow, col = TOPK(torch.full((500, 300), 2.5), 450)
    assert crow[1] == 300 and crow[2] == 450
    assert torch.equal(col, torch.cat([torch.arange(300), torch.arange(150)]).int())


def test_subnormal_scores_keep_their_order() -> None:
    scores = torch.arange(1, 4001, dtype=torch.float64).mul(5e-324).view(40, 100)
    assert mask_of(TOPK(scores, 700), 40, 100).view(-1)[-700:].all()
    single = torch.arange(1, 4001).to(torch.int32).view(torch.float32).view(40, 100)
    assert mask_of(TOPK(single, 700), 40, 100).view(-1)[-700:].all()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_csr(dtype: torch.dtype, largest: bool) -> None:
    scores = torch.randn(211, 307, generator=torch.Generator().manual_seed(3)).to(dtype)
    scores.view(-1)[::5] = float("nan")
    scores.view(-1)[::7] = 0.002
    scores.view(-1)[::9] = -0.0
    for threshold in (0.002, 0.0, -0.0, scores[1, 1].item(), float("inf"), -float("inf"), 1e300):
        reference = OPS["threshold_csr"].reference(scores, threshold, largest=largest)
        assert_same_csr(THRESHOLD(scores, threshold, largest=largest), reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 5, 129), (7, 300, 1), (130, 17, 515)], ids=str)
def test_factors_are_exact_on_integers(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, rank, columns = shape
    generator = torch.Generator().manual_seed(4)
    left = torch.randint(-8, 9, (rows, rank), generator=generator).to(dtype)
    right = torch.randint(-8, 9, (rank, columns), generator=generator).to(dtype)
    product = (left.double() @ right.double()).abs()
    for k in {0, 1, rows * columns // 20, rows * columns // 2, rows * columns}:
        assert_same_csr(FACTORS(left, right, k), OPS["topk_csr"].reference(product, k))


@pytest.mark.parametrize("shape", [(576, 128, 1536), (1000, 33, 777)], ids=str)
def test_factors_are_right_away_from_the_threshold(shape: tuple[int, int, int]) -> None:
    rows, rank, columns = shape
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(rows, rank, generator=generator)
    right = torch.randn(rank, columns, generator=generator)
    product = (left.double() @ right.double()).abs()
    k = rows * columns // 20
    threshold = product.flatten().topk(k).values[-1]
    selected = mask_of(FACTORS(left, right, k), rows, columns)
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


def test_same_bits_for_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(6)
    left = torch.randn(500, 40, generator=generator)
    right = torch.randn(40, 900, generator=generator)
    seed, step = torch.tensor(5), torch.tensor(9)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            scores = RANDOM(500, 900, seed=seed, step=step, parameter_id=3)
            results.append((*FACTORS(left, right, 20_000), *TOPK(scores, 20_000), scores))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_scores_bit_for_bit(shape: tuple[int, int]) -> None:
    arguments = {
        "seed": torch.tensor(-(2**45) - 3),
        "step": torch.tensor(2**33 + 7),
        "parameter_id": 2**32 - 1,
    }
    reference = OPS["random_scores"].reference(*shape, **arguments)
    assert torch.equal(RANDOM(*shape, **arguments), reference)


def test_opcheck() -> None:
    scores = torch.randn(5, 7)
    torch.library.opcheck(TOPK, (scores, 4))
    torch.library.opcheck(THRESHOLD, (scores, 0.5))
    torch.library.opcheck(FACTORS, (torch.randn(5, 2), torch.randn(2, 7), 4))
    keywords = {"seed": torch.tensor(1), "step": torch.tensor(2), "parameter_id": 0}
    torch.library.opcheck(RANDOM, (5, 7), keywords)
