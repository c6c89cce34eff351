"""Family sampled_grad: the route for CSRs of blocks, which has the very sums of "sampled"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_emulator
from op_cases import GPU, Backend, assert_close, embed
from partune import ops as public
from partune.ops._contract import OPS
from partune.ops.csr import csr_from_mask
from partune.ops.sampled_grad import PANELS_FROM, choose_route, sampled_grad_of_layer

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Tokens, rows, columns: no, one and several blocks of tokens, panels of rows and of columns.
SIZES = [(0, 4, 4), (4, 0, 8), (4, 8, 0), (1, 4, 4), (63, 4, 132), (129, 36, 16), (600, 12, 40),
         (64, 20, 1300), (5, 260, 24)]  # fmt: skip
if cuda_emulator.MODE == "tsan":  # which takes twenty times as long
    SIZES = [(0, 4, 4), (4, 0, 8), (4, 8, 0), (1, 4, 4), (63, 4, 40), (520, 4, 8), (5, 68, 32)]
REFERENCE = OPS["sampled_grad_"].reference
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def block_mask(rows: int, columns: int, density: float, seed: int = 0, side: int = 4) -> Tensor:
    """Blocks of side by side, a share of them selected, none of a block row in the middle."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows // side, columns // side, generator=generator) < density
    if rows > 2 * side:
        mask[rows // side // 2] = False
    return mask.repeat_interleave(side, 0).repeat_interleave(side, 1)


def case_of(mask: Tensor, tokens: int, dtype: torch.dtype, seed: int = 0) -> Case:
    """Values, grad, input, crow_indices and col_indices on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    crow, col = csr_from_mask(mask)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    grad, input = (draw(tokens, size).to(dtype) for size in mask.shape)
    return draw(col.numel()).to(wide), grad, input, crow, col


def case(size: tuple[int, int, int], dtype: torch.dtype, density: float = 0.4) -> Case:
    tokens, rows, columns = size
    return case_of(block_mask(rows, columns, density), tokens, dtype)


def run(ops: Any, arguments: Case, route: str = "blocks") -> Tensor:
    values, *rest = arguments
    values = values.clone()
    ops.sampled_grad_(values, *rest, route=route)
    return values


def to(arguments: Case, device: torch.device) -> Case:
    values, grad, input, crow, col = (argument.to(device) for argument in arguments)
    return values, grad, input, crow, col


def expected(values: Tensor, grad: Tensor, input: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    result = values.to(torch.float64, copy=True)
    REFERENCE(result, grad.double(), input.double(), crow, col, route="blocks")
    return result.to(values.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_sums_and_the_bits_of_sampled(
    ops: Any, device: torch.device, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    arguments = case(size, dtype)
    mine = run(ops, to(arguments, device))
    assert_close(mine, expected(*arguments))
    assert torch.equal(mine, run(ops, to(arguments, device), "sampled"))


@pytest.mark.parametrize("side", [4, 8])
@pytest.mark.parametrize("kind", ["no block", "one block", "the last block", "one block row",
                                  "one block column", "all"])  # fmt: skip
def test_skewed_selections(ops: Any, device: torch.device, kind: str, side: int) -> None:
    blocks = torch.full((4, 12), kind == "all")
    if kind == "one block":
        blocks[1, 5] = True
    if kind == "the last block":
        blocks[-1, -1] = True
    if kind == "one block row":
        blocks[2] = True
    if kind == "one block column":
        blocks[:, 10] = True
    mask = blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)
    arguments = case_of(mask, 70, torch.float32)
    mine = run(ops, to(arguments, device))
    assert_close(mine, expected(*arguments))
    assert torch.equal(mine, run(ops, to(arguments, device), "sampled"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["unaligned", "row_strided"])
def test_views(ops: Any, device: torch.device, layout: str, dtype: torch.dtype) -> None:
    """Factors and values inside larger buffers, whose other elements stay as they are."""
    arguments = case((70, 20, 36), dtype)
    values, grad, input, *csr = to(arguments, device)
    (grad, around_grad), (input, around_input) = embed(grad, layout), embed(input, layout)
    buffer = values.new_full((values.numel() + 9,), float("nan"))
    view = buffer[5:-4]
    view.copy_(values)
    before = around_grad.clone(), around_input.clone()
    ops.sampled_grad_(view, grad, input, *csr, route="blocks")
    assert_close(view, expected(*arguments))
    assert torch.equal(around_grad, before[0]) and torch.equal(around_input, before[1])
    assert buffer[:5].isnan().all() and buffer[-4:].isnan().all()


@pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)
@pytest.mark.parametrize("layout", ["transposed", "column_strided"])
def test_the_wrapper_takes_any_strides(device: torch.device, layout: str) -> None:
    arguments = case((70, 20, 36), torch.float32)
    values, grad, input, *csr = to(arguments, device)
    mine = values.clone()
    factors = embed(grad, layout)[0], embed(input, layout)[0]
    public.sampled_grad_(mine, *factors, *csr, route="blocks")
    assert_close(mine, expected(*arguments))
    made = public.sampled_grad(*factors, *csr, route="blocks")
    assert_close(made, expected(torch.zeros_like(arguments[0]), *arguments[1:]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_where_it_is(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    values, grad, input, *csr = case_of(torch.ones(12, 36, dtype=torch.bool), 40, dtype)
    grad[3, 2], grad[5, 4], input[7, 11] = float("nan"), float("inf"), float("-inf")
    arguments: Case = (torch.zeros_like(values), grad, input, csr[0], csr[1])
    mine = run(ops, to(arguments, device))
    assert_close(mine, expected(*arguments))
    touched = torch.zeros(12, 36, dtype=torch.bool)
    touched[[2, 4]], touched[:, 11] = True, True
    assert mine.cpu().isfinite().equal(~touched.flatten())


@pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)
@pytest.mark.parametrize("side", [2, 3])
def test_a_csr_of_other_entries_leaves_all_else_alone(
    ops: Any, device: torch.device, side: int
) -> None:
    """Whose values are wrong: that nothing beyond is read or written is all that is promised."""
    generator = torch.Generator().manual_seed(side)
    for density in (0.05, 0.5, 0.95):
        mask = torch.rand(20 // side + 1, 44 // side + 1, generator=generator) < density
        mask = mask.repeat_interleave(side, 0).repeat_interleave(side, 1)[:20, :44].clone()
        taken = mask.flatten().nonzero().flatten()
        mask.view(-1)[taken[: taken.numel() % 16]] = False
        values, *rest = to(case_of(mask, 40, torch.float32), device)
        buffer = values.new_full((values.numel() + 40,), float("nan"))
        view = buffer[20:-20]
        view.copy_(values)
        ops.sampled_grad_(view, *rest, route="blocks")
        assert view.isfinite().all()
        assert buffer[:20].isnan().all() and buffer[-20:].isnan().all()


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", ["all", "few"])
@pytest.mark.parametrize("shape", [(64, 708), (4500, 8), (20, 2600)], ids=str)
def test_same_bits_for_any_number_of_threads(
    ops: Any, shape: tuple[int, int], columns: str, dtype: torch.dtype
) -> None:
    """Wherever blocks are divided: into ranges that cut a block row, more rows than are packed at
    once, columns of which few hold all blocks."""
    mask = block_mask(*shape, density=0.2)
    if columns == "few":
        mask = torch.zeros_like(mask)
        mask[:, shape[1] // 8 * 4 :][:, :4] = True
    arguments = case_of(mask, 9 if shape[0] > 1000 else 300, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 4, 2):
            torch.set_num_threads(count)
            results.append(run(ops, arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert torch.equal(results[0], run(ops, arguments, "sampled"))
    assert_close(results[0], expected(*arguments))


@pytest.mark.parametrize("backend", ["cuda-emulated", GPU], indirect=True)
def test_same_bits_twice(backend: Backend) -> None:
    arguments = to(case((70, 12, 40), torch.bfloat16), backend.device)
    assert torch.equal(run(backend.ops, arguments), run(backend.ops, arguments))


@pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)
def test_opcheck(ops: Any, device: torch.device) -> None:
    arguments = to(case((5, 8, 12), torch.float32), device)
    torch.library.opcheck(ops.sampled_grad_.default, arguments, {"route": "blocks"})


def test_auto_takes_no_blocks_by_itself() -> None:
    """It doesn't read the CSR: of one that is no blocks the values are right."""
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[torch.arange(8), torch.arange(8)] = True
    mask[0, 1:] = mask[1, 0] = True
    arguments = case_of(mask, 30, torch.float32)
    assert arguments[4].numel() == 16
    assert_close(run(public, arguments, "auto"), expected(*arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_choose_route(dtype: torch.dtype) -> None:
    """Blocks below the density of their table, panels from there on."""
    _, limit = PANELS_FROM["cpu", dtype]
    factor = torch.empty(8, 100, dtype=dtype)
    below, above = torch.empty(int(limit * 10_000) - 1), torch.empty(round(limit * 10_000))
    assert choose_route(factor, factor, below, blocks=True) == "blocks"
    assert choose_route(factor, factor, above, blocks=True) == "panels"
    nothing = torch.empty(8, 0, dtype=dtype)
    assert choose_route(factor, nothing, torch.empty(0), blocks=True) == "blocks"


def test_a_layer_says_that_its_entries_are_blocks() -> None:
    arguments = case((30, 12, 40), torch.float32)
    _, grad, input, crow, col = arguments
    mine = sampled_grad_of_layer(grad, input, crow, col, blocks=True)
    assert_close(mine, expected(torch.zeros_like(arguments[0]), *arguments[1:]))
    half = grad.half(), input.half()
    assert choose_route(*half, col, blocks=True) == "blocks"
    of_half = sampled_grad_of_layer(*half, crow, col, blocks=True)
    wanted = run(torch.ops.partune, (torch.zeros_like(mine), *half, crow, col))
    assert torch.equal(of_half, wanted)
