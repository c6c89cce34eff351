"""Family sparse_adamw: the kernels against the plain-torch reference."""

from __future__ import annotations

import pytest
import torch

from op_cases import LAYOUTS, SHAPES, StepCase, assert_close, embed, random_csr, step_case
from partune.ops._contract import OPS

STEP = torch.ops.partune.sparse_adamw_.default
FOUND_INF = torch.ops.partune.found_inf_.default
REMAP = torch.ops.partune.remap_.default
REFERENCE = OPS["sparse_adamw_"].reference
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIXTEEN_BIT = [torch.bfloat16, torch.float16]


def compare_with_float64(case: StepCase) -> None:
    """Run the kernel, and the reference in float64 on the same numbers."""
    exact = case.copy(torch.float64)
    exact.masters = []
    if case.masters:  # the master is the weight, unrounded
        for i, (crow, col) in enumerate(zip(case.crow, case.col, strict=True)):
            rows = torch.repeat_interleave(torch.arange(crow.numel() - 1), crow.diff())
            exact.weights[i][rows, col.long()] = case.masters[i].double()
    case.run(STEP)
    exact.run(REFERENCE)
    for actual, reference in zip(case.weights, exact.weights, strict=True):
        assert_close(actual, reference.to(actual.dtype))
    for mine, theirs in ((case.exp_avgs, exact.exp_avgs), (case.exp_avg_sqs, exact.exp_avg_sqs)):
        for actual, reference in zip(mine, theirs, strict=True):
            assert_close(actual, reference.to(actual.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compact", [False, True])
def test_shapes_in_one_list(dtype: torch.dtype, compact: bool) -> None:
    compare_with_float64(step_case(SHAPES, dtype, compact=compact))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_parameters(dtype: torch.dtype) -> None:
    compare_with_float64(step_case(SHAPES, dtype, dense=True))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("masters", [False, True])
def test_float32_gradients_of_narrow_weights(dtype: torch.dtype, masters: bool) -> None:
    compare_with_float64(step_case(SHAPES, dtype, grad_dtype=torch.float32, masters=masters))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_masters_hold_the_unrounded_weight(dtype: torch.dtype) -> None:
    case = step_case([(63, 129)], dtype, masters=True)
    compare_with_float64(case)
    rows = torch.repeat_interleave(torch.arange(63), case.crow[0].diff())
    assert torch.equal(case.weights[0][rows, case.col[0].long()], case.masters[0].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT], ids=str)
def test_bfloat16_moments(dtype: torch.dtype) -> None:
    compare_with_float64(step_case(SHAPES, dtype, state_dtype=torch.bfloat16))


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
def test_options(dtype: torch.dtype, options: dict[str, object]) -> None:
    compare_with_float64(step_case([(63, 129)], dtype, **options))


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 200_000])
def test_bias_correction_over_a_run(step: int) -> None:
    for betas in ((0.9, 0.999), (0.9, 0.95), (0.5, 0.99999)):
        case = step_case([(9, 9)], torch.float32, density=1.0, beta1=betas[0], beta2=betas[1])
        case.steps = [torch.tensor(float(step))]
        compare_with_float64(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_with_sentinels_around_them(dtype: torch.dtype, layout: str) -> None:
    plain = step_case([(63, 129)], dtype)
    viewed = plain.copy()
    viewed.weights[0], buffer = embed(plain.weights[0], layout)
    viewed.grads[0], grad_buffer = embed(plain.grads[0], layout)
    around = buffer.clone()
    grad_before = grad_buffer.clone()
    viewed.run(STEP)
    plain.run(STEP)
    assert torch.equal(viewed.weights[0], plain.weights[0])
    assert torch.equal(grad_buffer, grad_before)
    viewed.weights[0].fill_(777)
    around_view = around.as_strided(
        viewed.weights[0].shape, viewed.weights[0].stride(), viewed.weights[0].storage_offset()
    )
    around_view.fill_(777)
    assert torch.equal(buffer, around), "the step wrote outside of the parameter"


def test_unselected_weights_keep_their_bits() -> None:
    case = step_case([(63, 129)], torch.float32)
    before = case.weights[0].clone()
    case.run(STEP)
    mask = torch.zeros(63, 129, dtype=torch.bool)
    rows = torch.repeat_interleave(torch.arange(63), case.crow[0].diff())
    mask[rows, case.col[0].long()] = True
    assert torch.equal(case.weights[0][~mask], before[~mask])
    assert (case.weights[0][mask] != before[mask]).all()


def test_more_than_two_dimensions_are_rows() -> None:
    flat = step_case([(12, 20)], torch.float32)
    shaped = flat.copy()
    shaped.weights[0] = shaped.weights[0].view(3, 4, 4, 5)
    shaped.grads[0] = shaped.grads[0].view(3, 4, 4, 5)
    shaped.crow, shaped.col = flat.crow, flat.col
    shaped.run(STEP)
    flat.run(STEP)
    assert torch.equal(shaped.weights[0].view(12, 20), flat.weights[0])


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_same_bits_twice_and_for_any_number_of_threads(
    dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    case = step_case(
        [(129, 1000), (300, 300)], dtype, rounding="stochastic", state_dtype=state_dtype
    )
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            once = case.copy()
            once.run(STEP)
            results.append(once.mutated())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_stochastic_rounding_bit_for_bit(dtype: torch.dtype, layout: str) -> None:
    """With no gradient and short factors the arithmetic is exact, so only the rounding is left."""
    case = step_case(
        [(63, 129), (5, 700)], dtype, rounding="stochastic", state_dtype=torch.bfloat16,
        lr=torch.tensor(0.5), weight_decay=0.25 + 2**-9, beta1=0.75 + 2**-9, beta2=0.5 + 2**-10,
        offset=torch.tensor(2**32 + 5),
    )  # fmt: skip
    case.options["seed"] = torch.tensor(-(2**40) - 17)
    for i, weight in enumerate(case.weights):
        case.grads[i] = torch.zeros_like(case.grads[i])
        case.exp_avgs[i].zero_()
        case.exp_avg_sqs[i].abs_()
        scales = torch.logspace(-8, 5, weight.numel()).view_as(weight)
        case.weights[i], _ = embed((weight * scales).to(dtype), layout)
    reference = case.copy()
    case.run(STEP)
    reference.run(REFERENCE)
    for a, b in zip(case.mutated(), reference.mutated(), strict=True):
        assert torch.equal(a, b)


def test_stochastic_rounding_is_right_on_average() -> None:
    """An update of 1/8 of the last bit arrives in 1/8 of the entries."""
    n = 200_000
    case = step_case(
        [(1, n)], torch.bfloat16, dense=True, rounding="stochastic", weight_decay=0.0, eps=0.0,
        beta1=0.0, beta2=0.0, lr=torch.tensor(2.0**-7 / 8),
    )  # fmt: skip
    case.weights[0] = torch.full((1, n), 1.5, dtype=torch.bfloat16)
    case.grads[0] = torch.full((1, n), -1.0, dtype=torch.bfloat16)
    case.run(STEP)
    moved = (case.weights[0] != 1.5).float().mean().item()
    assert set(case.weights[0].unique().tolist()) == {1.5, 1.5 + 2.0**-7}
    sigma = (0.125 * 0.875 / n) ** 0.5
    assert abs(moved - 0.125) < 5 * sigma


def test_nan_and_inf_gradients_stay_where_they_are() -> None:
    case = step_case([(9, 40)], torch.float32, density=1.0)
    clean = case.copy()
    case.grads[0][2, 3] = float("nan")
    case.grads[0][2, 4] = float("inf")
    case.run(STEP)
    clean.run(STEP)
    assert case.weights[0][2, 3:5].isnan().all()
    case.weights[0][2, 3:5] = clean.weights[0][2, 3:5]
    assert torch.equal(case.weights[0], clean.weights[0])


def test_found_inf_writes_nothing() -> None:
    case = step_case(SHAPES, torch.float32, found_inf=torch.tensor(1.0))
    before = case.copy()
    case.run(STEP)
    for a, b in zip(case.mutated(), before.mutated(), strict=True):
        assert torch.equal(a, b)


def test_every_selected_entry_is_stepped_once() -> None:
    case = step_case(SHAPES, torch.float32, beta1=0.5, weight_decay=0.0)
    for value, grad in zip(case.exp_avgs, case.grads, strict=True):
        value.fill_(4.0)
        grad.fill_(2.0)
    case.run(STEP)
    for value in case.exp_avgs:
        assert (value == 3.0).all()


def test_offsets_beyond_two_to_the_31() -> None:
    """Three rows of 2^30 columns, of which only the touched pages exist."""
    rows, columns = 3, 2**30
    weight = torch.empty(rows, columns, dtype=torch.bfloat16)
    crow = torch.tensor([0, 1, 2, 4])
    col = torch.tensor([5, 7, 1, columns - 1], dtype=torch.int32)
    places = [(0, 5), (1, 7), (2, 1), (2, columns - 1)]
    for row, column in places:
        weight[row, column] = 1.0
    moments = torch.zeros(4), torch.zeros(4)
    case = step_case([(1, 1)], torch.bfloat16)
    options = {**case.options, "weight_decay": 0.0, "lr": torch.tensor(0.5)}
    STEP([weight], [torch.ones(4)], [crow], [col], [moments[0]], [moments[1]], [],
         [torch.tensor(1.0)], [0], **options)  # fmt: skip
    assert [weight[place].item() for place in places] == [0.5] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compact", [False, True])
def test_found_inf_(dtype: torch.dtype, bad: float, compact: bool) -> None:
    case = step_case([(63, 129), (5, 700)], dtype, compact=compact)
    flag = torch.tensor(0.0)
    FOUND_INF(flag, case.grads, case.crow, case.col)
    assert flag.item() == 0
    target = case.grads[1]
    if compact:
        target[-1] = bad
    else:
        rows = torch.repeat_interleave(torch.arange(5), case.crow[1].diff())
        unselected = torch.ones(5, 700, dtype=torch.bool)
        unselected[rows, case.col[1].long()] = False
        target[unselected] = bad
        FOUND_INF(flag, case.grads, case.crow, case.col)
        assert flag.item() == 0, "an unselected gradient counts for nothing"
        target[rows[-1], case.col[1][-1].long()] = bad
    FOUND_INF(flag, case.grads, case.crow, case.col)
    assert flag.item() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_remap_(shape: tuple[int, int], dtype: torch.dtype) -> None:
    old_crow, old_col = random_csr(*shape, 0.3, seed=1)
    new_crow, new_col = random_csr(*shape, 0.3, seed=2)
    old = [torch.randn(old_col.numel()).to(dtype) for _ in range(3)]
    new = [torch.full((new_col.numel(),), 9.0, dtype=dtype) for _ in range(3)]
    expected = [value.clone() for value in new]
    count = REMAP(new, old, old_crow, old_col, new_crow, new_col)
    reference = OPS["remap_"].reference
    assert count == reference(expected, old, old_crow, old_col, new_crow, new_col)
    for a, b in zip(new, expected, strict=True):
        assert torch.equal(a, b)


def test_a_backward_made_stale_raises() -> None:
    case = step_case([(4, 4)], torch.float32, density=1.0)
    weight = case.weights[0].requires_grad_()
    loss = weight.square().sum()
    with torch.no_grad():
        case.run(STEP)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck() -> None:
    case = step_case([(4, 6), (3, 3)], torch.float32)
    args = (
        case.weights, case.grads, case.crow, case.col, case.exp_avgs, case.exp_avg_sqs, [],
        case.steps, [0, 1],
    )  # fmt: skip
    torch.library.opcheck(STEP, args, case.options)
    torch.library.opcheck(FOUND_INF, (torch.tensor(0.0), case.grads, case.crow, case.col))
    old, new = random_csr(4, 6, 0.5, 1), random_csr(4, 6, 0.5, 2)
    values = [torch.zeros(new[1].numel())], [torch.ones(old[1].numel())]
    torch.library.opcheck(REMAP, (*values, *old, *new))
