"""Family select where its kernels have edges: tiles, passes over them, alignment, memory's ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from partune.ops._contract import OPS

TOPK_REFERENCE = OPS["topk_csr"].reference
# CUDA's tiles have 64 rows (float64: 32) and 128 columns; scans pass over 32 tiles of a row, and
# over 1024 rows.
TILES = [(65, 128), (32, 256), (3, 127), (1, 4096), (1024, 1), (1025, 2)]
# Its slices of the rank are 16 deep (float64: 8).
FACTOR_TILES = [(1, 4, 4), (65, 16, 128), (3, 32, 132), (2, 20, 256), (33, 8, 4)]


def scores_with_ties(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(11)).double()


def assert_selects(ops: Any, scores: Tensor, k: int) -> None:
    reference = TOPK_REFERENCE(scores.cpu(), k)
    for mine, expected in zip(ops.topk_csr(scores, k), reference, strict=True):
        assert torch.equal(mine.cpu(), expected)


def shifted(value: Tensor, offset: int) -> Tensor:
    """The same values from `offset` elements on in an allocation that ends with them."""
    return torch.cat([value.new_full((offset,), 777), value.view(-1)])[offset:].view(value.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", TILES, ids=str)
def test_shapes_of_whole_tiles(
    ops: Any, device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    scores = scores_with_ties(*shape).to(device, dtype)
    for k in (1, scores.numel() // 3, scores.numel()):
        assert_selects(ops, scores, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_of_whole_packs_that_are_not_aligned(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    scores = scores_with_ties(3, 132).to(device, dtype)
    for offset in (1, 2, 3):
        assert_selects(ops, shifted(scores, offset), 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", FACTOR_TILES, ids=str)
def test_factors_of_whole_slices(
    ops: Any, device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Aligned, then one and the other not: what is beyond a factor's end is not read."""
    rows, rank, columns = shape
    left = scores_with_ties(rows, rank).to(device, dtype)
    right = scores_with_ties(rank, columns).to(device, dtype)
    product = (left.cpu().double() @ right.cpu().double()).abs()
    for k in (rows * columns // 3, rows * columns):
        expected = TOPK_REFERENCE(product, k)
        for a, b in ((left, right), (shifted(left, 1), right), (left, shifted(right, 1))):
            for mine, theirs in zip(ops.topk_csr_factors(a, b, k), expected, strict=True):
                assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_worst_key_is_the_threshold(ops: Any, device: torch.device, dtype: torch.dtype) -> None:
    """NaN's key is 0: of each digit the last bin is meant."""
    scores = scores_with_ties(5, 9).to(device, dtype)
    scores[1:4, 2] = float("nan")
    for k in (43, 45):
        assert_selects(ops, scores, k)
