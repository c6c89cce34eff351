"""Family sparse_adamw: the kernels of every backend against the plain-torch reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import cuda_emulator
from op_cases import (
    CPU,
    GPU,
    LAYOUTS,
    SHAPES,
    Backend,
    StepCase,
    assert_close,
    embed,
    random_csr,
    step_case,
)
from partune import _native
from partune.ops._contract import OPS

REFERENCE = OPS["sparse_adamw_"].reference
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIXTEEN_BIT = [torch.bfloat16, torch.float16]


def compare_with_float64(case: StepCase, ops: Any) -> None:
    """Run the kernel, and the reference in float64 on the same numbers."""
    exact = case.copy(torch.float64, CPU)
    exact.masters = []
    for i, master in enumerate(case.masters):  # the master is the weight, unrounded
        exact.weights[i][case.mask(i)] = master.double().cpu()
    case.run(ops.sparse_adamw_)
    exact.run(REFERENCE)
    for actual, reference in zip(case.weights, exact.weights, strict=True):
        assert_close(actual, reference.to(actual.dtype))
    for mine, theirs in ((case.exp_avgs, exact.exp_avgs), (case.exp_avg_sqs, exact.exp_avg_sqs)):
        for actual, reference in zip(mine, theirs, strict=True):
            assert_close(actual, reference.to(actual.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compact", [False, True])
def test_shapes_in_one_list(
    ops: Any, device: torch.device, dtype: torch.dtype, compact: bool
) -> None:
    compare_with_float64(step_case(SHAPES, dtype, compact=compact, device=device), ops)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_parameters(ops: Any, device: torch.device, dtype: torch.dtype) -> None:
    compare_with_float64(step_case(SHAPES, dtype, dense=True, device=device), ops)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("masters", [False, True])
def test_float32_gradients_of_narrow_weights(
    ops: Any, device: torch.device, dtype: torch.dtype, masters: bool
) -> None:
    case = step_case(SHAPES, dtype, grad_dtype=torch.float32, masters=masters, device=device)
    compare_with_float64(case, ops)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_masters_hold_the_unrounded_weight(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    case = step_case([(63, 129)], dtype, masters=True, device=device)
    compare_with_float64(case, ops)
    assert torch.equal(case.weights[0].cpu()[case.mask(0)], case.masters[0].to(dtype).cpu())


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT], ids=str)
def test_bfloat16_moments(ops: Any, device: torch.device, dtype: torch.dtype) -> None:
    compare_with_float64(step_case(SHAPES, dtype, state_dtype=torch.bfloat16, device=device), ops)


@pytest.mark.parametrize(
    "options",
    [
        {"eps_mode": "uncorrected"},
        {"maximize": True},
        {"beta1": 0.0},
        {"beta2": 0.0},
        {"weight_decay": 0.0},
        {"eps": 0.0},
        {"lr": torch.tensor(0.25)},
        {"grad_scale": torch.tensor(1024.0)},
        {"found_inf": torch.tensor(0.0)},
    ],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_options(
    ops: Any, device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    compare_with_float64(step_case([(63, 129)], dtype, device=device, **options), ops)


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 200_000])
def test_bias_correction_over_a_run(ops: Any, device: torch.device, step: int) -> None:
    for beta1, beta2 in ((0.9, 0.999), (0.9, 0.95), (0.5, 0.99999)):
        case = step_case(
            [(9, 9)], torch.float32, density=1.0, beta1=beta1, beta2=beta2, device=device
        )
        case.steps = [torch.tensor(float(step), device=device)]
        compare_with_float64(case, ops)


def test_more_matrices_than_one_launch_takes(ops: Any, device: torch.device) -> None:
    compare_with_float64(step_case([(3, 5)] * 250, torch.float32, device=device), ops)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_with_sentinels_around_them(
    ops: Any, device: torch.device, dtype: torch.dtype, layout: str
) -> None:
    plain = step_case([(63, 129)], dtype, device=device)
    viewed = plain.copy()
    viewed.weights[0], buffer = embed(plain.weights[0], layout)
    viewed.grads[0], grad_buffer = embed(plain.grads[0], layout)
    around = buffer.clone()
    grad_before = grad_buffer.clone()
    viewed.run(ops.sparse_adamw_)
    plain.run(ops.sparse_adamw_)
    assert torch.equal(viewed.weights[0], plain.weights[0])
    assert torch.equal(grad_buffer, grad_before)
    viewed.weights[0].fill_(777)
    around_view = around.as_strided(
        viewed.weights[0].shape, viewed.weights[0].stride(), viewed.weights[0].storage_offset()
    )
    around_view.fill_(777)
    assert torch.equal(buffer, around), "the step wrote outside of the parameter"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_state(ops: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Views that start anywhere in their allocations, and end where these do."""

    def shift(values: list[Tensor], offset: int) -> list[Tensor]:
        return [torch.cat([v.new_zeros(offset), v])[offset:] for v in values]

    masters = dtype in SIXTEEN_BIT
    plain = step_case([(63, 129), (1, 1100)], dtype, masters=masters, compact=True, device=device)
    for offset in (1, 2, 3):
        shifted = plain.copy()
        shifted.grads = shift(shifted.grads, offset)
        shifted.col = shift(shifted.col, offset)
        shifted.exp_avgs = shift(shifted.exp_avgs, 3 - offset)
        shifted.exp_avg_sqs = shift(shifted.exp_avg_sqs, offset)
        shifted.masters = shift(shifted.masters, offset)
        expected = plain.copy()
        shifted.run(ops.sparse_adamw_)
        expected.run(ops.sparse_adamw_)
        for a, b in zip(shifted.mutated(), expected.mutated(), strict=True):
            assert torch.equal(a, b)


def test_unselected_weights_keep_their_bits(ops: Any, device: torch.device) -> None:
    case = step_case([(63, 129)], torch.float32, device=device)
    before = case.weights[0].cpu().clone()
    case.run(ops.sparse_adamw_)
    after, mask = case.weights[0].cpu(), case.mask(0)
    assert torch.equal(after[~mask], before[~mask])
    assert (after[mask] != before[mask]).all()


def test_more_than_two_dimensions_are_rows(ops: Any, device: torch.device) -> None:
    flat = step_case([(12, 20)], torch.float32, device=device)
    shaped = flat.copy()
    shaped.weights[0] = shaped.weights[0].view(3, 4, 4, 5)
    shaped.grads[0] = shaped.grads[0].view(3, 4, 4, 5)
    shaped.crow, shaped.col = flat.crow, flat.col
    shaped.run(ops.sparse_adamw_)
    flat.run(ops.sparse_adamw_)
    assert torch.equal(shaped.weights[0].view(12, 20), flat.weights[0])


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
def test_same_bits_for_any_number_of_threads(ops: Any, combination: dict[str, Any]) -> None:
    case = step_case([(129, 1000), (300, 300)], **combination, rounding="stochastic")
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            once = case.copy()
            once.run(ops.sparse_adamw_)
            results.append(once.mutated())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cuda-emulated", GPU], indirect=True)
@pytest.mark.parametrize("combination", DTYPE_COMBINATIONS, ids=lambda c: str([*c.values()]))
def test_the_bits_of_the_cpu(backend: Backend, combination: dict[str, Any]) -> None:
    mine = step_case(SHAPES, **combination, rounding="stochastic", device=backend.device)
    cpu = mine.copy(device=CPU)
    mine.run(backend.ops.sparse_adamw_)
    cpu.run(torch.ops.partune.sparse_adamw_)
    fuses = _native.require().cpu_isa() != "baseline"  # which rounds multiply-adds twice
    for a, b in zip(mine.mutated(), cpu.mutated(), strict=True):
        if fuses:
            assert torch.equal(a.cpu(), b)
        else:
            assert_close(a, b)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_stochastic_rounding_bit_for_bit(
    ops: Any, device: torch.device, dtype: torch.dtype, layout: str
) -> None:
    """With no gradient and short factors the arithmetic is exact, so only the rounding is left."""
    case = step_case(
        [(63, 129), (5, 700)], dtype, rounding="stochastic", state_dtype=torch.bfloat16,
        lr=torch.tensor(0.5), weight_decay=0.25 + 2**-9, beta1=0.75 + 2**-9, beta2=0.5 + 2**-10,
        offset=torch.tensor(2**32 + 5), device=device,
    )  # fmt: skip
    case.options["seed"] = torch.tensor(-(2**40) - 17, device=device)
    for i, weight in enumerate(case.weights):
        case.grads[i] = torch.zeros_like(case.grads[i])
        case.exp_avgs[i].zero_()
        case.exp_avg_sqs[i].abs_()
        scales = torch.logspace(-8, 5, weight.numel(), device=device).view_as(weight)
        case.weights[i], _ = embed((weight * scales).to(dtype), layout)
    reference = case.copy(device=CPU)
    case.run(ops.sparse_adamw_)
    reference.run(REFERENCE)
    for a, b in zip(case.mutated(), reference.mutated(), strict=True):
        assert torch.equal(a.cpu(), b)


def test_stochastic_rounding_is_right_on_average(ops: Any, device: torch.device) -> None:
    """An update of 1/8 of the last bit arrives in 1/8 of the entries."""
    n = 200_000 if cuda_emulator.MODE == "plain" else 20_000
    case = step_case(
        [(1, n)], torch.bfloat16, dense=True, rounding="stochastic", weight_decay=0.0, eps=0.0,
        beta1=0.0, beta2=0.0, lr=torch.tensor(2.0**-7 / 8), device=device,
    )  # fmt: skip
    case.weights[0] = torch.full((1, n), 1.5, dtype=torch.bfloat16, device=device)
    case.grads[0] = torch.full((1, n), -1.0, dtype=torch.bfloat16, device=device)
    case.run(ops.sparse_adamw_)
    moved = (case.weights[0] != 1.5).float().mean().item()
    assert set(case.weights[0].unique().tolist()) == {1.5, 1.5 + 2.0**-7}
    sigma = (0.125 * 0.875 / n) ** 0.5
    assert abs(moved - 0.125) < 5 * sigma


def test_nan_and_inf_gradients_stay_where_they_are(ops: Any, device: torch.device) -> None:
    case = step_case([(9, 40)], torch.float32, density=1.0, device=device)
    clean = case.copy()
    case.grads[0][2, 3] = float("nan")
    case.grads[0][2, 4] = float("inf")
    case.run(ops.sparse_adamw_)
    clean.run(ops.sparse_adamw_)
    assert case.weights[0][2, 3:5].isnan().all()
    case.weights[0][2, 3:5] = clean.weights[0][2, 3:5]
    assert torch.equal(case.weights[0], clean.weights[0])


def test_found_inf_writes_nothing(ops: Any, device: torch.device) -> None:
    case = step_case(SHAPES, torch.float32, found_inf=torch.tensor(1.0), device=device)
    before = case.copy()
    case.run(ops.sparse_adamw_)
    for a, b in zip(case.mutated(), before.mutated(), strict=True):
        assert torch.equal(a, b)


def test_every_selected_entry_is_stepped_once(ops: Any, device: torch.device) -> None:
    case = step_case(SHAPES, torch.float32, beta1=0.5, weight_decay=0.0, device=device)
    for value, grad in zip(case.exp_avgs, case.grads, strict=True):
        value.fill_(4.0)
        grad.fill_(2.0)
    case.run(ops.sparse_adamw_)
    for value in case.exp_avgs:
        assert (value == 3.0).all()


def test_offsets_beyond_two_to_the_31(backend: Backend) -> None:
    """Three rows of 2^30 columns, of which only the touched pages exist."""
    rows, columns = 3, 2**30
    device = backend.device
    # Not in all orders: that compares whole allocations.
    ops = cuda_emulator.load() if backend.name == "cuda-emulated" else backend.ops
    weight = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    crow = torch.tensor([0, 1, 2, 4], device=device)
    col = torch.tensor([5, 7, 1, columns - 1], dtype=torch.int32, device=device)
    places = [(0, 5), (1, 7), (2, 1), (2, columns - 1)]
    for row, column in places:
        weight[row, column] = 1.0
    case = step_case(
        [(1, 1)], torch.bfloat16, weight_decay=0.0, lr=torch.tensor(0.5), device=device
    )
    case.weights, case.grads = [weight], [torch.ones(4, device=device)]
    case.crow, case.col, case.steps = [crow], [col], [torch.tensor(1.0, device=device)]
    case.exp_avgs = [torch.zeros(4, device=device)]
    case.exp_avg_sqs = [torch.zeros(4, device=device)]
    case.run(ops.sparse_adamw_)
    assert [weight[place].item() for place in places] == [0.5] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compact", [False, True])
def test_found_inf_(
    ops: Any, device: torch.device, dtype: torch.dtype, bad: float, compact: bool
) -> None:
    case = step_case([(63, 129), (5, 700)], dtype, compact=compact, device=device)
    flag = torch.tensor(0.0, device=device)

    def look() -> float:
        ops.found_inf_(flag, case.grads, case.crow, case.col)
        return flag.item()

    assert look() == 0
    target = case.grads[1]
    if compact:
        target[-1] = bad
    else:
        mask = case.mask(1)
        target[~mask.to(device)] = bad
        assert look() == 0, "an unselected gradient counts for nothing"
        target[tuple(mask.nonzero()[-1])] = bad
    assert look() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_remap_(ops: Any, device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    old_csr, new_csr = random_csr(*shape, 0.3, seed=1), random_csr(*shape, 0.3, seed=2)
    old = [torch.randn(old_csr[1].numel()).to(dtype) for _ in range(3)]
    new = [torch.full((new_csr[1].numel(),), 9.0, dtype=dtype) for _ in range(3)]
    mine = [[value.to(device, copy=True) for value in values] for values in (new, old)]
    csrs = [indices.to(device) for indices in (*old_csr, *new_csr)]
    count = ops.remap_(*mine, *csrs)
    assert count == OPS["remap_"].reference(new, old, *old_csr, *new_csr)
    for a, b in zip(mine[0], new, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)
def test_a_backward_made_stale_raises(ops: Any, device: torch.device) -> None:
    case = step_case([(4, 4)], torch.float32, density=1.0, device=device)
    weight = case.weights[0].requires_grad_()
    loss = weight.square().sum()
    with torch.no_grad():
        case.run(ops.sparse_adamw_)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)
def test_opcheck(ops: Any, device: torch.device) -> None:
    case = step_case([(4, 6), (3, 3)], torch.float32, device=device)
    args = (
        case.weights, case.grads, case.crow, case.col, case.exp_avgs, case.exp_avg_sqs, [],
        case.steps, [0, 1],
    )  # fmt: skip
    torch.library.opcheck(ops.sparse_adamw_.default, args, case.options)
    flag = torch.tensor(0.0, device=device)
    torch.library.opcheck(ops.found_inf_.default, (flag, case.grads, case.crow, case.col))
    old, new = random_csr(4, 6, 0.5, 1), random_csr(4, 6, 0.5, 2)
    values = [torch.zeros(new[1].numel())], [torch.ones(old[1].numel())]
    arguments = tree_map(lambda value: value.to(device), (*values, *old, *new))
    torch.library.opcheck(ops.remap_.default, arguments)
