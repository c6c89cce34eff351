"""Family sampled_grad: the selected entries of a weight's gradient, by every route."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_emulator
from op_cases import GPU, TOLERANCE, Backend, assert_close, embed, random_csr
from partune import ops as public
from partune.ops._contract import OPS
from partune.ops.csr import csr_from_mask
from partune.ops.sampled_grad import PANELS_FROM, choose_route

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUTES = ["sampled", "panels"]
# Tokens, rows, columns: one and several blocks of tokens, panels of rows and of columns.
SIZES = [(0, 3, 3), (4, 0, 5), (4, 3, 0), (1, 1, 1), (3, 3, 3), (63, 5, 129), (129, 33, 17),
         (256, 16, 16), (1000, 3, 7), (5, 129, 1000), (17, 1, 1500)]  # fmt: skip
if cuda_emulator.MODE == "tsan":  # which takes twenty times as long
    SIZES = [(0, 3, 3), (4, 0, 5), (4, 3, 0), (1, 1, 1), (63, 5, 40), (520, 2, 3), (5, 65, 33)]
REFERENCE = OPS["sampled_grad_"].reference
Csr = tuple[Tensor, Tensor]


def case(
    size: tuple[int, int, int], dtype: torch.dtype, density: float = 0.3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values, grad, input, crow_indices and col_indices on the CPU."""
    tokens, rows, columns = size
    generator = torch.Generator().manual_seed(seed)
    crow, col = random_csr(rows, columns, density, seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.randn(col.numel(), generator=generator).to(wide)
    grad = torch.randn(tokens, rows, generator=generator, dtype=torch.float64).to(dtype)
    input = torch.randn(tokens, columns, generator=generator, dtype=torch.float64).to(dtype)
    return values, grad, input, crow, col


def expected(values: Tensor, grad: Tensor, input: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    result = values.double()
    REFERENCE(result, grad.double(), input.double(), crow, col, route="sampled")
    return result.to(values.dtype)


def tolerance_of(values: Tensor, grad: Tensor, route: str) -> float:
    """Panels of 16 bits round each sum to 16 bits, as the dense product does."""
    return TOLERANCE[grad.dtype if route == "panels" else values.dtype]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sampled_grad_(
    ops: Any, device: torch.device, size: tuple[int, int, int], dtype: torch.dtype, route: str
) -> None:
    arguments = case(size, dtype)
    values, *rest = (argument.to(device, copy=True) for argument in arguments)
    ops.sampled_grad_(values, *rest, route=route)
    assert_close(values, expected(*arguments), tolerance_of(values, rest[0], route))


@pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference(device: torch.device, dtype: torch.dtype) -> None:
    """The oracle itself, in several of its panels, beside a dense product."""
    values, grad, input, crow, col = (t.to(device) for t in case((20, 600, 30), dtype))
    rows = torch.repeat_interleave(torch.arange(600, device=device), crow.diff())
    dense = grad.double().t() @ input.double()
    wanted = (values.double() + dense[rows, col.long()]).to(values.dtype)
    REFERENCE(values, grad, input, crow, col, route="sampled")
    assert_close(values, wanted)


def test_several_panels(ops: Any, device: torch.device) -> None:
    """Of 64 rows, the fewest that any backend's has."""
    arguments = case((2, 65, 8200), torch.float64, density=0.002)
    values, *rest = (argument.to(device, copy=True) for argument in arguments)
    ops.sampled_grad_(values, *rest, route="panels")
    assert_close(values, expected(*arguments))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["one row", "one column", "all", "none"])
def test_skewed_selections(ops: Any, device: torch.device, kind: str, route: str) -> None:
    values, grad, input, *_ = case((70, 20, 600), torch.float32, density=1.0)
    mask = torch.full((20, 600), kind == "all")
    if kind == "one row":
        mask[7] = True
    if kind == "one column":
        mask[:, 511] = True
    csr = csr_from_mask(mask)
    values = torch.ones(csr[1].numel())
    mine = values.to(device, copy=True)
    ops.sampled_grad_(mine, *(t.to(device) for t in (grad, input, *csr)), route=route)
    assert_close(mine, expected(values, grad, input, *csr))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["unaligned", "row_strided"])
def test_views(ops: Any, device: torch.device, layout: str, dtype: torch.dtype, route: str) -> None:
    """Factors and values inside larger buffers, whose other elements stay as they are."""
    arguments = case((70, 19, 37), dtype)
    values, grad, input, *csr = (t.to(device) for t in arguments)
    (grad, around_grad), (input, around_input) = embed(grad, layout), embed(input, layout)
    buffer = values.new_full((values.numel() + 9,), 777)
    view = buffer[5:-4]
    view.copy_(values)
    before = around_grad.clone(), around_input.clone()
    ops.sampled_grad_(view, grad, input, *csr, route=route)
    assert_close(view, expected(*arguments), tolerance_of(values, grad, route))
    assert torch.equal(around_grad, before[0]) and torch.equal(around_input, before[1])
    assert (buffer[:5] == 777).all() and (buffer[-4:] == 777).all()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)
@pytest.mark.parametrize("layout", ["transposed", "column_strided"])
def test_the_wrapper_takes_any_strides(device: torch.device, layout: str, route: str) -> None:
    arguments = case((70, 19, 37), torch.float32)
    values, grad, input, *csr = (t.to(device, copy=True) for t in arguments)
    public.sampled_grad_(values, embed(grad, layout)[0], embed(input, layout)[0], *csr, route=route)
    assert_close(values, expected(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_where_it_is(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    values, grad, input, *_ = case((40, 9, 33), dtype, density=1.0)
    grad[3, 2], grad[5, 4], input[7, 11] = float("nan"), float("inf"), float("-inf")
    csr = csr_from_mask(torch.ones(9, 33, dtype=torch.bool))
    wanted = torch.zeros(csr[1].numel(), dtype=values.dtype)
    mine = wanted.to(device, copy=True)
    ops.sampled_grad_(mine, *(t.to(device) for t in (grad, input, *csr)), route="sampled")
    assert_close(mine, expected(wanted, grad, input, *csr))
    touched = torch.zeros(9, 33, dtype=torch.bool)
    touched[[2, 4]], touched[:, 11] = True, True
    assert mine.cpu().isfinite().equal(~touched.flatten())


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_same_bits_however_parts_are_cut(ops: Any) -> None:
    """More rows than are packed at once, and columns of which few hold all entries."""
    for rows, columns, live in ((4500, 6, slice(None)), (70, 900, slice(700, 703))):
        _, grad, input, *_ = case((9, rows, columns), torch.float32)
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        mask[:, live] = True
        csr = csr_from_mask(mask)
        values, threads = torch.randn(csr[1].numel()), torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                results.append(values.clone())
                ops.sampled_grad_(results[-1], grad, input, *csr, route="sampled")
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0], other) for other in results[1:])
        assert_close(results[0], expected(values, grad, input, *csr))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(ops: Any, dtype: torch.dtype) -> None:
    """And so wherever the entries are divided: an entry's neighbours don't change its sum."""
    values, grad, input, crow, col = case((300, 60, 700), dtype, density=0.2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (threads, 1, 2, 3, 2):
            torch.set_num_threads(count)
            mine = values.clone()
            ops.sampled_grad_(mine, grad, input, crow, col, route="sampled")
            results.append(mine)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    first = int(crow[20])
    part = values[first : first + 5].clone()
    part_crow = torch.where(torch.arange(61) > 20, 5, 0)
    ops.sampled_grad_(part, grad, input, part_crow, col[first : first + 5], route="sampled")
    assert torch.equal(part, results[0][first : first + 5])


@pytest.mark.parametrize("backend", ["cuda-emulated", GPU], indirect=True)
def test_same_bits_twice(backend: Backend) -> None:
    values, grad, input, *csr = (t.to(backend.device) for t in case((70, 9, 40), torch.bfloat16))
    first, second = values.clone(), values.clone()
    backend.ops.sampled_grad_(first, grad, input, *csr, route="sampled")
    backend.ops.sampled_grad_(second, grad, input, *csr, route="sampled")
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)
@pytest.mark.parametrize("route", ROUTES)
def test_opcheck(ops: Any, device: torch.device, route: str) -> None:
    arguments = tuple(t.to(device) for t in case((5, 4, 6), torch.float32))
    torch.library.opcheck(ops.sampled_grad_.default, arguments, {"route": route})


@pytest.mark.parametrize("route", ["sampled", "blocks"])
def test_sizes_beyond_int32(route: str) -> None:
    """Of a fake: 2^32 elements of a factor, and of the product that is never formed."""
    grad = torch.empty(2**20, 2**12, device="meta")
    input = torch.empty(2**20, 2**20, device="meta")
    crow = torch.empty(2**12 + 1, dtype=torch.int64, device="meta")
    col = torch.empty(2**32, dtype=torch.int32, device="meta")
    assert public.sampled_grad(grad, input, crow, col, route=route).shape == (2**32,)


def test_a_stale_backward_raises() -> None:
    values, *rest = case((5, 4, 6), torch.float32)
    leaf = torch.ones_like(values).requires_grad_()
    product = leaf * values
    public.sampled_grad_(values, *rest)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("route", [*ROUTES, "blocks", "auto"])
def test_in_a_compiled_backward(route: str) -> None:
    """As a layer calls it: in an autograd.Function, also of factors that require a gradient."""
    _, weight_grad, x, crow, col = case((6, 4, 8), torch.float32)
    weight = torch.ones(4, 8)
    if route == "blocks":
        crow, col = csr_from_mask(torch.arange(8).expand(4, 8) >= 4)

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, values: Tensor, *frozen: Tensor) -> Tensor:
            # torch 2.10 compiles no tensors of an outer scope here.
            ctx.save_for_backward(x, *frozen)
            return x @ frozen[0].t()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            x, weight, crow, col = ctx.saved_tensors
            values_grad = public.sampled_grad(grad, x, crow, col, route=route)
            return grad @ weight, values_grad, None, None, None

    def loss(x: Tensor, values: Tensor) -> Tensor:
        return (Linear.apply(x, values, weight, crow, col) * weight_grad).sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        values = torch.zeros(col.numel(), requires_grad=True)
        function(x.clone().requires_grad_(), values).backward()
        gradients.append(values.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert_close(gradients[0], expected(torch.zeros(col.numel()), weight_grad, x, crow, col))
    required = public.sampled_grad(weight_grad, x.requires_grad_(), crow, col, route=route)
    assert_close(required, gradients[0])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0.5), (torch.bfloat16, 0.35)])
def test_choose_route(dtype: torch.dtype, limit: float) -> None:
    """Sampled below the density of the table, panels from there on."""
    assert PANELS_FROM["cpu", dtype][0] == limit
    factor = torch.empty(8, 100, dtype=dtype)
    below, above = torch.empty(int(limit * 10_000) - 1), torch.empty(int(limit * 10_000))
    assert choose_route(factor, factor, below) == "sampled"
    assert choose_route(factor, factor, above) == "panels"
    assert choose_route(factor, torch.empty(8, 0, dtype=dtype), torch.empty(0)) == "sampled"


def test_float16_is_always_sampled_on_the_cpu() -> None:
    factor = torch.empty(8, 100, dtype=torch.float16)
    assert choose_route(factor, factor, torch.empty(10_000)) == "sampled"
