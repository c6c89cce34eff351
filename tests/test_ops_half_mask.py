"""Family half_mask: the kernels of every backend against the plain-torch reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_emulator
from half_cases import LEVELS, MASK_SEED, HalfCase, half_case
from op_cases import CPU, GPU, LAYOUTS, Backend, assert_close, embed
from partune import _native
from partune.ops._contract import OPS
from partune.ops._half_mask_reference import unpack_mask

REFERENCE = OPS["half_adamw_"].reference
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIXTEEN_BIT = [torch.bfloat16, torch.float16]
SHAPES = [(0, 5), (3, 0), (1, 1), (3, 3), (31, 67), (1, 1100), (130, 3), (3, 1030)]
COUNTS = [0, 1, 3, 63, 127, 128, 129, 1000, 1024, 1025, 5000, 33_000]


def compare_with_float64(case: HalfCase, ops: Any) -> None:
    """Run the kernel, and the reference in float64 on the same numbers."""
    exact = case.copy(torch.float64, CPU)
    exact.masters = []
    for i, master in enumerate(case.masters):  # the master is the weight, unrounded
        exact.weights[i][case.mask(i)] = master.double().cpu().flatten()
    case.run(ops.half_adamw_)
    exact.run(REFERENCE)
    for mine, theirs in (
        (case.weights, exact.weights),
        (case.exp_avgs, exact.exp_avgs),
        (case.exp_avg_sqs, exact.exp_avg_sqs),
    ):
        for actual, reference in zip(mine, theirs, strict=True):
            assert_close(actual, reference.to(actual.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_shapes_in_one_list(ops: Any, device: torch.device, dtype: torch.dtype, level: str) -> None:
    compare_with_float64(half_case(level, SHAPES, dtype, device=device), ops)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("masters", [False, True])
def test_float32_gradients_of_narrow_weights(
    ops: Any, device: torch.device, dtype: torch.dtype, level: str, masters: bool
) -> None:
    case = half_case(
        level, [(63, 129), (3, 5)], dtype, grad_dtype=torch.float32, masters=masters, device=device
    )
    compare_with_float64(case, ops)
    if masters:
        live = case.weights[0].cpu()[case.mask(0)]
        assert torch.equal(live, case.masters[0].to(dtype).cpu().flatten())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT], ids=str)
def test_bfloat16_moments(ops: Any, device: torch.device, dtype: torch.dtype, level: str) -> None:
    case = half_case(
        level, [(63, 129), (1, 1100)], dtype, state_dtype=torch.bfloat16, device=device
    )
    compare_with_float64(case, ops)


@pytest.mark.parametrize(
    "options",
    [
        {"eps_mode": "uncorrected"},
        {"maximize": True},
        {"beta1": 0.0},
        {"weight_decay": 0.0},
        {"lr": torch.tensor(0.25)},
        {"grad_scale": torch.tensor(1024.0)},
        {"found_inf": torch.tensor(0.0)},
    ],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize("level", ["rows", "elements"])
def test_options(ops: Any, device: torch.device, level: str, options: dict[str, Any]) -> None:
    case = half_case(level, [(63, 129)], torch.float32, device=device, **options)
    compare_with_float64(case, ops)


@pytest.mark.parametrize("backend", ["cuda-emulated", GPU], indirect=True)
@pytest.mark.parametrize("level", ["rows", "stored"])
def test_more_matrices_than_one_launch_takes(ops: Any, device: torch.device, level: str) -> None:
    compare_with_float64(half_case(level, [(2, 3)] * 175, torch.float32, device=device), ops)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_with_sentinels_around_them(
    ops: Any, device: torch.device, dtype: torch.dtype, level: str, layout: str
) -> None:
    plain = half_case(level, [(63, 129)], dtype, device=device)
    viewed = plain.copy()
    viewed.weights[0], buffer = embed(plain.weights[0], layout)
    viewed.grads[0], grad_buffer = embed(plain.grads[0], layout)
    around, grad_before = buffer.clone(), grad_buffer.clone()
    viewed.run(ops.half_adamw_)
    plain.run(ops.half_adamw_)
    assert torch.equal(viewed.weights[0], plain.weights[0])
    for a, b in zip(viewed.exp_avgs, plain.exp_avgs, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(grad_buffer, grad_before)
    view = viewed.weights[0]
    around.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(777)
    view.fill_(777)
    assert torch.equal(buffer, around), "the step wrote outside of the parameter"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_unaligned_state(ops: Any, device: torch.device, dtype: torch.dtype, level: str) -> None:
    """Views that start anywhere in their allocations, and end where these do."""

    def shift(values: list[Tensor], offset: int) -> list[Tensor]:
        return [
            torch.cat([v.new_zeros(offset), v.flatten()])[offset:].view(v.shape) for v in values
        ]

    masters = dtype in SIXTEEN_BIT
    plain = half_case(level, [(31, 67)], dtype, masters=masters, device=device)
    for offset in (1, 2, 3):
        shifted, expected = plain.copy(), plain.copy()
        shifted.weights = shift(shifted.weights, offset)
        shifted.live = shift(shifted.live, offset)
        shifted.exp_avgs = shift(shifted.exp_avgs, 3 - offset)
        shifted.exp_avg_sqs = shift(shifted.exp_avg_sqs, offset)
        shifted.masters = shift(shifted.masters, offset)
        shifted.run(ops.half_adamw_)
        expected.run(ops.half_adamw_)
        for a, b in zip(shifted.mutated(), expected.mutated(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_frozen_weights_keep_their_bits(
    ops: Any, device: torch.device, dtype: torch.dtype, level: str
) -> None:
    case = half_case(level, [(63, 129), (1, 1100)], dtype, device=device, lr=torch.tensor(0.5))
    for weight, mask in ((w, case.mask(i)) for i, w in enumerate(case.weights)):
        weight[~mask.to(device)] = float("nan")  # would spread if it were computed with
    case.weights[0][~case.mask(0).to(device)] = -0.0
    before = case.copy()
    case.run(ops.half_adamw_)
    for i, weight in enumerate(case.weights):
        mask = case.mask(i)
        frozen = ~mask
        assert cuda_emulator.same_bits(weight.cpu()[frozen], before.weights[i].cpu()[frozen])
        assert weight.cpu()[mask].isfinite().all()
        if dtype in (torch.float32, torch.float64):
            assert (weight.cpu()[mask] != before.weights[i].cpu()[mask]).all()


def test_a_stored_mask_ends_with_the_last_entry(ops: Any, device: torch.device) -> None:
    """Whatever the bits beyond it say, of its word and of those that complete a counter."""
    clean = half_case("stored", [(1, 1), (3, 3), (31, 67), (1, 1100)], torch.float32, device=device)
    case = clean.copy()
    for mask, weight in zip(case.live, case.weights, strict=True):
        beyond = torch.arange(32 * mask.numel()) >= weight.numel()
        bits = (beyond.view(-1, 32) << torch.arange(32)).sum(1)
        mask |= torch.where(bits >= 2**31, bits - 2**32, bits).to(device, torch.int32)
    case.run(ops.half_adamw_)
    clean.run(ops.half_adamw_)
    for a, b in zip(case.mutated(), clean.mutated(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("level", ["rows", "columns"])
def test_vectors_and_stacked_matrices_are_seen_as_lines(
    ops: Any, device: torch.device, level: str
) -> None:
    flat = half_case(level, [(12, 20), (30, 1) if level == "rows" else (1, 30)], torch.float32,
                     device=device)  # fmt: skip
    shaped = flat.copy()
    for values in (shaped.weights, shaped.grads):
        values[0], values[1] = values[0].view(3, 4, 20), values[1].view(30)
    shaped.run(ops.half_adamw_)
    flat.run(ops.half_adamw_)
    assert torch.equal(shaped.weights[0].view(12, 20), flat.weights[0])
    assert torch.equal(shaped.weights[1], flat.weights[1].flatten())


# What changes the bits of an update, one at a time.
DTYPE_COMBINATIONS = [
    {"dtype": dtype, "state_dtype": state, "grad_dtype": grad, "masters": masters}
    for dtype in DTYPES
    for state in (None, torch.bfloat16)
    for grad in (None, torch.float32)
    for masters in (False, True)
    if dtype in SIXTEEN_BIT or not masters
    if dtype in SIXTEEN_BIT or grad is None
    if dtype != torch.float64 or state is None
]


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("combination", DTYPE_COMBINATIONS, ids=lambda c: str([*c.values()]))
@pytest.mark.parametrize("level", LEVELS)
def test_same_bits_for_any_number_of_threads(
    ops: Any, combination: dict[str, Any], level: str
) -> None:
    case = half_case(level, [(129, 1000), (300, 300)], **combination, rounding="stochastic")
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            once = case.copy()
            once.run(ops.half_adamw_)
            results.append(once.mutated())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cuda-emulated", GPU], indirect=True)
@pytest.mark.parametrize("combination", DTYPE_COMBINATIONS, ids=lambda c: str([*c.values()]))
@pytest.mark.parametrize("level", LEVELS)
def test_the_bits_of_the_cpu(backend: Backend, combination: dict[str, Any], level: str) -> None:
    shapes = [(0, 5), (1, 1), (31, 67), (1, 1100), (40, 3)]
    mine = half_case(level, shapes, **combination, rounding="stochastic", device=backend.device)
    cpu = mine.copy(device=CPU)
    mine.run(backend.ops.half_adamw_)
    cpu.run(torch.ops.partune.half_adamw_)
    fuses = _native.require().cpu_isa() != "baseline"  # which rounds multiply-adds twice
    for a, b in zip(mine.mutated(), cpu.mutated(), strict=True):
        if fuses:
            assert torch.equal(a.cpu(), b)
        else:
            assert_close(a, b)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_stochastic_rounding_bit_for_bit(
    ops: Any, device: torch.device, dtype: torch.dtype, level: str
) -> None:
    """With no gradient and short factors the arithmetic is exact, so only the rounding is left."""
    case = half_case(
        level, [(63, 129), (5, 700)], dtype, rounding="stochastic", state_dtype=torch.bfloat16,
        lr=torch.tensor(0.5), weight_decay=0.25 + 2**-9, beta1=0.75 + 2**-9, beta2=0.5 + 2**-10,
        offset=torch.tensor(2**32 + 5), device=device,
    )  # fmt: skip
    for i, weight in enumerate(case.weights):
        case.grads[i].zero_()
        case.exp_avgs[i].zero_()
        scales = torch.logspace(-8, 5, weight.numel(), device=device).view_as(weight)
        case.weights[i] = (weight * scales).to(dtype)
    reference = case.copy(device=CPU)
    case.run(ops.half_adamw_)
    reference.run(REFERENCE)
    for a, b in zip(case.mutated(), reference.mutated(), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("level", LEVELS)
def test_nan_and_inf_gradients_stay_where_they_are(
    ops: Any, device: torch.device, level: str
) -> None:
    case = half_case(level, [(9, 40)], torch.float32, device=device)
    clean = case.copy()
    places = case.mask(0).nonzero()[3:5]
    case.grads[0][tuple(places[0])] = float("nan")
    case.grads[0][tuple(places[1])] = float("inf")
    case.grads[0][~case.mask(0).to(device)] = float("nan")  # of frozen entries: not even read
    case.run(ops.half_adamw_)
    clean.run(ops.half_adamw_)
    for place in places:
        assert case.weights[0][tuple(place)].isnan()
        case.weights[0][tuple(place)] = clean.weights[0][tuple(place)]
    assert torch.equal(case.weights[0], clean.weights[0])


@pytest.mark.parametrize("level", LEVELS)
def test_found_inf_writes_nothing(ops: Any, device: torch.device, level: str) -> None:
    case = half_case(level, SHAPES, torch.float32, found_inf=torch.tensor(1.0), device=device)
    before = case.copy()
    case.run(ops.half_adamw_)
    for a, b in zip(case.mutated(), before.mutated(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("level", LEVELS)
def test_every_live_entry_is_stepped_once(ops: Any, device: torch.device, level: str) -> None:
    case = half_case(level, SHAPES, torch.float32, beta1=0.5, weight_decay=0.0, device=device)
    for value, grad in zip(case.exp_avgs, case.grads, strict=True):
        value.fill_(4.0)
        grad.fill_(2.0)
    case.run(ops.half_adamw_)
    for value in case.exp_avgs:
        assert (value == 3.0).all()


@pytest.mark.parametrize("level", ["rows", "columns"])
def test_offsets_beyond_two_to_the_31(backend: Backend, level: str) -> None:
    """Three lines of 2^30 entries, of which only the touched pages exist."""
    ops = cuda_emulator.load() if backend.name == "cuda-emulated" else backend.ops
    device = backend.device
    long, live = 2**30, torch.tensor([2**30 - 1], dtype=torch.int32, device=device)
    shape = (3, long)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    kept = (3, 1)
    if level == "rows":  # rows of one entry, 2^30 apart in memory
        weight = weight.t()
        kept = (1, 3)
    case = half_case("rows", [(1, 1)], torch.bfloat16, weight_decay=0.0, lr=torch.tensor(0.5),
                     device=device)  # fmt: skip
    places = [(2**30 - 1, i) if level == "rows" else (i, 2**30 - 1) for i in range(3)]
    grad = torch.empty_strided(weight.shape, weight.stride(), dtype=torch.bfloat16, device=device)
    for place in places:
        weight[place], grad[place] = 1.0, 1.0
    case.level, case.weights, case.grads, case.live = level, [weight], [grad], [live]
    case.steps = [torch.tensor(1.0, device=device)]
    case.exp_avgs = [torch.zeros(kept, device=device)]
    case.exp_avg_sqs = [torch.zeros(kept, device=device)]
    case.run(ops.half_adamw_)
    assert [weight[place].item() for place in places] == [0.5] * 3


# ---- masks ----


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("seed", [0, -(2**40) - 17])
def test_random_mask(ops: Any, device: torch.device, count: int, seed: int) -> None:
    mask_seed = torch.tensor(seed, device=device)
    mine = ops.random_mask(count, mask_seed=mask_seed, mask_id=2**32 - 2)
    theirs = OPS["random_mask"].reference(count, mask_seed=torch.tensor(seed), mask_id=2**32 - 2)
    assert torch.equal(mine.cpu(), theirs)
    assert unpack_mask(theirs, count).sum() == sum(
        (int(word) & 0xFFFFFFFF).bit_count() for word in theirs
    )


@pytest.mark.parametrize("count", COUNTS)
def test_mask_counts(ops: Any, device: torch.device, count: int) -> None:
    words = -(-count // 128) * 4
    generator = torch.Generator().manual_seed(count)
    mask = torch.randint(-(2**31), 2**31, (words,), generator=generator).int()
    mine = ops.mask_counts(mask.to(device), count)
    assert torch.equal(mine.cpu(), OPS["mask_counts"].reference(mask, count))
    assert mine.sum() == unpack_mask(mask, count).sum()


def test_a_mask_is_one_half_and_without_structure(ops: Any, device: torch.device) -> None:
    """Within 4 sigma of a half; chi-squared over rows, columns and pairs of neighbours."""
    small = cuda_emulator.MODE != "plain"
    rows, columns = (64, 256) if small else (256, 1024)
    count = rows * columns
    for mask_id in range(2 if small else 4):
        packed = ops.random_mask(count, mask_seed=torch.tensor(11, device=device), mask_id=mask_id)
        mask = unpack_mask(packed.cpu(), count).view(rows, columns).double()
        assert abs(mask.mean() - 0.5) < 4 * 0.5 / count**0.5
        for totals, size in ((mask.sum(1), columns), (mask.sum(0), rows)):
            statistic = ((totals - size / 2).square() / (size / 4)).sum().item()
            assert_chi_squared(statistic, len(totals))
        flat = mask.flatten()
        for lag in (1, 2, 31, 32, 127, 128, 1024, columns):
            pairs = torch.bincount((2 * flat[:-lag] + flat[lag:]).long(), minlength=4).double()
            # Overlapping pairs: their agreement alone is compared, a sum of independent signs.
            agree = pairs[0] + pairs[3]
            n = count - lag
            assert abs(agree - n / 2) < 4.5 * (n / 4) ** 0.5, f"entries {lag} apart"
        cells = flat[: count // 8 * 8].view(-1, 8).long() @ (2 ** torch.arange(8))
        seen = torch.bincount(cells, minlength=256).double()
        expected = len(cells) / 256
        assert_chi_squared(((seen - expected).square() / expected).sum().item(), 255)


def assert_chi_squared(statistic: float, degrees: int) -> None:
    """Within 4.5 sigma, by Wilson and Hilferty's approximation."""
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    assert abs(z) < 4.5, f"chi^2 {statistic:.1f} of {degrees} degrees: {z:.1f} sigma"


def test_masks_of_two_ids_and_seeds_are_independent(ops: Any, device: torch.device) -> None:
    count = 2**14
    masks = [
        unpack_mask(
            ops.random_mask(count, mask_seed=torch.tensor(s, device=device), mask_id=i).cpu(), count
        )
        for s, i in ((0, 0), (0, 1), (1, 0), (2**32, 0))
    ]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).double().mean() - 0.5) < 4.5 * 0.5 / count**0.5


@pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)
def test_a_backward_made_stale_raises(ops: Any, device: torch.device) -> None:
    case = half_case("rows", [(4, 4)], torch.float32, device=device)
    weight = case.weights[0].requires_grad_()
    loss = weight.square().sum()
    with torch.no_grad():
        case.run(ops.half_adamw_)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)
@pytest.mark.parametrize("level", LEVELS)
def test_opcheck(ops: Any, device: torch.device, level: str) -> None:
    case = half_case(level, [(4, 6), (3, 3)], torch.float32, device=device)
    args = (
        case.weights, case.grads, case.live, case.ranks, case.exp_avgs, case.exp_avg_sqs, [],
        case.steps, [0, 1], [5, 6],
    )  # fmt: skip
    options = {"level": case.op_level, **case.options}
    torch.library.opcheck(ops.half_adamw_.default, args, options)
    seed = {"mask_seed": torch.tensor(MASK_SEED, device=device), "mask_id": 3}
    torch.library.opcheck(ops.random_mask.default, (300,), seed)
    mask = ops.random_mask(300, **seed)
    torch.library.opcheck(ops.mask_counts.default, (mask, 300))
