"""Family csr_entries: entries of matrices, gathered and scattered on every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_emulator
from op_cases import CPU, GPU, LAYOUTS, SHAPES, Backend, embed, random_csr
from partune import ops as public
from partune.ops._contract import OPS
from partune.ops.csr import csr_from_mask, mask_from_csr

FLOAT64, FLOAT32, BFLOAT16, FLOAT16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# Of a matrix and of its values.
DTYPES = [
    (FLOAT64, FLOAT64), (FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16), (FLOAT16, FLOAT16),
    (BFLOAT16, FLOAT32), (FLOAT16, FLOAT32),
]  # fmt: skip
GATHER, SCATTER = OPS["gather_csr_"].reference, OPS["scatter_csr_"].reference
# CUDA's tiles have 1024 entries, a thread four of them.
EDGES = [(1, 1), (1, 1023), (2, 512), (1, 1025), (5, 1), (3, 7)]


@dataclass
class Case:
    """The arguments of a call of either op."""

    matrices: list[Tensor]
    values: list[Tensor]
    crow: list[Tensor]
    col: list[Tensor]

    def gather(self, op: Any) -> None:
        op(self.values, self.matrices, self.crow, self.col)

    def scatter(self, op: Any) -> None:
        op(self.matrices, self.values, self.crow, self.col)

    def copy(self, device: torch.device = CPU) -> Case:
        parts = (self.matrices, self.values, self.crow, self.col)
        return Case(*([t.to(device, copy=True) for t in part] for part in parts))

    def plus(self, other: Case) -> Case:
        return Case(
            self.matrices + other.matrices, self.values + other.values, self.crow + other.crow,
            self.col + other.col,
        )  # fmt: skip


def make(
    shapes: list[tuple[int, int]],
    dtypes: tuple[torch.dtype, torch.dtype] = (FLOAT32, FLOAT32),
    *,
    density: float = 0.2,
    seed: int = 0,
    device: torch.device = CPU,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    case = Case([], [], [], [])
    for i, (rows, columns) in enumerate(shapes):
        crow, col = random_csr(rows, columns, density, seed + i)
        case.crow.append(crow)
        case.col.append(col)
        for tensors, shape, dtype in (
            (case.matrices, (rows, columns), dtypes[0]),
            (case.values, (col.numel(),), dtypes[1]),
        ):
            drawn = torch.randn(shape, generator=generator, dtype=FLOAT64)
            tensors.append(drawn.to(dtype))
    return case.copy(device)


def of_all_dtypes(device: torch.device) -> Case:
    case = Case([], [], [], [])
    for i, dtypes in enumerate(DTYPES):
        case = case.plus(make([(9, 23), (3, 400)], dtypes, seed=i, device=device))
    return case


def assert_same(mine: Case, wanted: Case) -> None:
    for a, b in zip(mine.matrices + mine.values, wanted.matrices + wanted.values, strict=True):
        assert cuda_emulator.same_bits(a.cpu(), b)


def compare(ops: Any, case: Case) -> None:
    """Both ops beside the reference, bit for bit; what is read keeps its bits too."""
    mine, wanted = case.copy(case.values[0].device), case.copy()
    mine.gather(ops.gather_csr_)
    wanted.gather(GATHER)
    assert_same(mine, wanted)
    mine, wanted = case.copy(case.values[0].device), case.copy()
    mine.scatter(ops.scatter_csr_)
    wanted.scatter(SCATTER)
    assert_same(mine, wanted)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_shapes_in_one_list(
    ops: Any, device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    compare(ops, make(SHAPES, dtypes, device=device))


def test_dtypes_in_one_list(ops: Any, device: torch.device) -> None:
    compare(ops, of_all_dtypes(device))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_empty_lists(ops: Any) -> None:
    ops.gather_csr_([], [], [], [])
    ops.scatter_csr_([], [], [], [])


@pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_reference(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The oracle itself, beside a boolean mask."""
    case = make([(9, 23)], dtypes, device=device)
    mask = mask_from_csr(case.crow[0], case.col[0], 23)
    before = case.copy(device)
    case.gather(GATHER)
    assert torch.equal(case.values[0], before.matrices[0][mask].to(dtypes[1]))
    before.scatter(SCATTER)
    assert torch.equal(before.matrices[0][mask], before.values[0].to(dtypes[0]))
    assert torch.equal(before.matrices[0][~mask], case.matrices[0][~mask])


@pytest.mark.parametrize("kind", ["one row", "one column", "all", "none"])
def test_skewed_selections(ops: Any, device: torch.device, kind: str) -> None:
    case = make([(20, 600)], device=device)
    mask = torch.full((20, 600), kind == "all")
    if kind == "one row":
        mask[7] = True
    if kind == "one column":
        mask[:, 511] = True
    crow, col = csr_from_mask(mask)
    case.crow[0], case.col[0] = crow.to(device), col.to(device)
    case.values[0] = torch.randn(col.numel(), device=device)
    compare(ops, case)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_nothing_beyond_the_last_entry_is_touched(
    ops: Any, device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Each matrix alone, and its last entry the last of all its memory."""
    for shape in EDGES:
        compare(ops, make([shape], dtypes, density=1.0, device=device))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_with_sentinels_around_them(
    ops: Any, device: torch.device, layout: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    for shape in ((63, 40), (1, 9), (9, 1)):
        plain = make([shape], dtypes, device=device)
        viewed = plain.copy(device)
        viewed.matrices[0], buffer = embed(plain.matrices[0], layout)
        before, around = buffer.clone(), viewed.copy(device)
        viewed.gather(ops.gather_csr_)
        around.matrices = plain.copy(device).matrices
        around.gather(GATHER)
        assert torch.equal(viewed.values[0], around.values[0])
        assert torch.equal(buffer, before)

        viewed.values = plain.copy(device).values
        viewed.scatter(ops.scatter_csr_)
        wanted, _ = embed(plain.matrices[0], layout)
        plain.scatter(SCATTER)
        assert torch.equal(viewed.matrices[0], plain.matrices[0])
        viewed.matrices[0].copy_(wanted)
        assert torch.equal(buffer, before), "scatter wrote outside of the matrix"


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_vectors_that_start_anywhere(
    ops: Any, device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Views of larger allocations, and their neighbours there."""
    plain = make([(63, 40), (1, 1100)], dtypes, device=device)
    for op, run in ((ops.gather_csr_, Case.gather), (ops.scatter_csr_, Case.scatter)):
        wanted = plain.copy(device)
        run(wanted, op)
        for offset in (1, 2, 3):
            mine = plain.copy(device)
            buffers = [v.new_full((v.numel() + offset + 1,), 777) for v in mine.values]
            mine.values = [b[offset:-1].copy_(v) for b, v in zip(buffers, mine.values, strict=True)]
            mine.col = [torch.cat([c.new_zeros(4 - offset), c])[4 - offset :] for c in mine.col]
            run(mine, op)
            for a, b in zip(
                mine.values + mine.matrices, wanted.values + wanted.matrices, strict=True
            ):
                assert torch.equal(a, b)
            for buffer in buffers:
                assert (buffer[:offset] == 777).all() and buffer[-1] == 777


def test_more_matrices_than_one_launch_takes(ops: Any, device: torch.device) -> None:
    compare(ops, make([(2, 3)] * 490, density=0.6, device=device))


SPECIAL = [
    0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 1e-7, 6.1e-5, -6e-8, 3e-8,
    65519.99, 65520.0, -65520.0, 3.4e38, -3.4e38, 1.17e-38,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_rounding_to_nearest_bit_for_bit(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    """Ties between all neighbours of some binades, to even, and what is special."""
    one = torch.ones((), dtype=dtype)
    step = float(torch.nextafter(one, one + 1) - 1) / 2
    ties = [sign * scale * (1 + i * step) for sign in (1, -1) for scale in (1.0, 2.0**-15)
            for i in range(9)]  # fmt: skip
    values = torch.tensor(SPECIAL + ties)
    crow = torch.tensor([0, values.numel()], device=device)
    col = torch.arange(values.numel(), dtype=torch.int32, device=device)
    matrix = torch.zeros(1, values.numel(), dtype=dtype, device=device)
    ops.scatter_csr_([matrix], [values.to(device)], [crow], [col])
    wanted, mine = values.to(dtype), matrix[0].cpu()
    assert torch.equal(mine.isnan(), wanted.isnan())
    known = ~wanted.isnan()
    assert torch.equal(mine.view(torch.int16)[known], wanted.view(torch.int16)[known])
    widened = torch.empty(values.numel(), device=device)
    ops.gather_csr_([widened], [matrix], [crow], [col])
    assert torch.equal(widened.cpu()[known], wanted.float()[known])
    assert widened.cpu()[~known].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        (BFLOAT16, torch.int16),
        (FLOAT16, torch.int16),
        (FLOAT32, torch.int32),
        (FLOAT64, torch.int64),
    ],
    ids=str,
)
def test_of_one_dtype_every_bit_is_copied(
    ops: Any, device: torch.device, dtype: torch.dtype, bits: torch.dtype
) -> None:
    """Signalling NaNs with their payload too."""
    highest = torch.iinfo(bits).max
    signalling = {BFLOAT16: 0x7F81, FLOAT16: 0x7C01, FLOAT32: 0x7F800001, FLOAT64: 0x7FF0 << 48 | 1}
    words = torch.tensor([[signalling[dtype], highest, -1, -highest - 1, 1, 0]], dtype=bits)
    matrix = words.to(device).view(dtype)
    crow = torch.tensor([0, 6], device=device)
    col = torch.arange(6, dtype=torch.int32, device=device)
    values = torch.zeros(6, dtype=dtype, device=device)
    ops.gather_csr_([values], [matrix], [crow], [col])
    assert torch.equal(values.view(bits).cpu(), words[0])
    empty = torch.zeros_like(matrix)
    ops.scatter_csr_([empty], [values], [crow], [col])
    assert torch.equal(empty.view(bits).cpu(), words)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_however_many_threads_divide_the_entries(ops: Any) -> None:
    case = make([(129, 1000), (1, 0), (300, 300), (7, 4000)], density=0.4)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            compare(ops, case)
    finally:
        torch.set_num_threads(threads)


def test_offsets_beyond_two_to_the_31(backend: Backend) -> None:
    """Three rows of 2^30 columns, of which only the touched pages exist."""
    columns, device = 2**30, backend.device
    # Not in all orders: that compares whole allocations.
    ops = cuda_emulator.load() if backend.name == "cuda-emulated" else backend.ops
    matrix = torch.empty(3, columns, dtype=BFLOAT16, device=device)
    crow = torch.tensor([0, 1, 2, 4], device=device)
    col = torch.tensor([5, 7, 1, columns - 1], dtype=torch.int32, device=device)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    ops.scatter_csr_([matrix], [values], [crow], [col])
    places = [(0, 5), (1, 7), (2, 1), (2, columns - 1)]
    assert [matrix[place].item() for place in places] == [1.0, 2.0, 3.0, 4.0]
    gathered = torch.zeros(4, dtype=BFLOAT16, device=device)
    ops.gather_csr_([gathered], [matrix], [crow], [col])
    assert gathered.tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)
def test_opcheck(ops: Any, device: torch.device) -> None:
    case = of_all_dtypes(device)
    arguments = (case.values, case.matrices, case.crow, case.col)
    torch.library.opcheck(ops.gather_csr_.default, arguments)
    arguments = (case.matrices, case.values, case.crow, case.col)
    torch.library.opcheck(ops.scatter_csr_.default, arguments)


@pytest.mark.parametrize("dtype", [None, FLOAT32, BFLOAT16])
def test_gather_csr_makes_the_vector(dtype: torch.dtype | None) -> None:
    case = make([(9, 23)], (BFLOAT16, BFLOAT16))
    made = public.gather_csr(case.matrices[0], case.crow[0], case.col[0], dtype=dtype)
    case.gather(GATHER)
    assert made.dtype == (dtype or BFLOAT16)
    assert torch.equal(made, case.values[0].to(made.dtype))


def test_sizes_beyond_int32() -> None:
    """Of a fake: a matrix of 2^40 entries, of which 2^33 are gathered and scattered."""
    matrix = torch.empty(2**20, 2**20, device="meta")
    crow = torch.empty(2**20 + 1, dtype=torch.int64, device="meta")
    col = torch.empty(2**33, dtype=torch.int32, device="meta")
    values = public.gather_csr(matrix, crow, col)
    assert values.shape == (2**33,)
    public.scatter_csr_([matrix], [values], [crow], [col])


@pytest.mark.parametrize("name", ["gather_csr_", "scatter_csr_"])
def test_a_stale_backward_raises(name: str) -> None:
    case = make([(4, 6)])
    written = case.values[0] if name == "gather_csr_" else case.matrices[0]
    product = torch.ones_like(written).requires_grad_() * written
    run = Case.gather if name == "gather_csr_" else Case.scatter
    run(case, getattr(public, name))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_compiled_without_a_break() -> None:
    case = make([(9, 23), (4, 6)])

    def exchange(matrices: list[Tensor], values: list[Tensor]) -> Tensor:
        before = public.gather_csr(matrices[0], case.crow[0], case.col[0])
        public.scatter_csr_(matrices, values, case.crow, case.col)
        return before + matrices[0].sum()

    plain, compiled = case.copy(), case.copy()
    wanted = exchange(plain.matrices, plain.values)
    function = torch.compile(exchange, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(compiled.matrices, compiled.values), wanted)
    assert_same(compiled, plain)
