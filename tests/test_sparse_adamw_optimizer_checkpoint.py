"""Checkpoints: bit for bit, dtype for dtype, and all or nothing."""

import io

import pytest
import torch
from torch.nn import Parameter

from partune.optim import SparseAdamW
from partune.selection import Magnitude, Movement, PrincipalWeights, Random


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def make(dtype, selection, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 17), (9,), (3, 8, 5)]
    params = [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    settings = {"lr": 1e-2, "density": 0.3, "refresh_interval": 4, **options}
    return params, SparseAdamW(params, selection=selection, **settings)


def run(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def same(a, b):
    """Equal in every type, dtype and bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float32, {"state_dtype": torch.bfloat16}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"master_weights": False, "state_dtype": torch.bfloat16, "seed": 5}),
        (torch.float16, {"budget_rank": 2, "density": None, "maximize": True}),
    ],
)
@pytest.mark.parametrize("selection", [PrincipalWeights(3), Movement(), Random(7)])
def test_resumes_bit_for_bit_across_a_refresh(dtype, options, selection):
    params, optimizer = make(dtype, selection, **options)
    run(params, optimizer, range(6))
    saved, weights = through_a_file(optimizer.state_dict()), [p.detach().clone() for p in params]
    run(params, optimizer, range(6, 14))

    resumed, other = make(dtype, selection, **options)
    for p, values in zip(resumed, weights, strict=True):
        p.data.copy_(values)
    other.load_state_dict(saved)
    run(resumed, other, range(6, 14))
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    assert same(optimizer.state_dict(), other.state_dict())


def test_every_dtype_survives_and_large_indices_stay_exact():
    weight = Parameter(torch.randn(2, 80_000).to(torch.bfloat16))
    optimizer = SparseAdamW([weight], selection=Magnitude(), density=0.05)
    run([weight], optimizer, range(1))
    before = {k: v.clone() for k, v in optimizer.state[weight].items() if k != "selection"
              and isinstance(v, torch.Tensor)}  # fmt: skip
    assert before["col_indices"].max() > 70_000
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    after = optimizer.state[weight]
    assert all(same(value, after[name]) for name, value in before.items())
    assert after["col_indices"].dtype == torch.int32 and after["exp_avg"].dtype == torch.float32


def test_loading_copies():
    params, optimizer = make(torch.float32, Magnitude())
    run(params, optimizer, range(2))
    twins, twin = make(torch.float32, Magnitude())
    twin.load_state_dict(optimizer.state_dict())
    moments = optimizer.state[params[0]]["exp_avg"].clone()
    run(twins, twin, range(2, 4))
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], moments)


def test_options_come_from_the_checkpoint_and_selections_stay_objects():
    params, optimizer = make(torch.float32, PrincipalWeights(3), density=0.2, lr=0.5)
    run(params, optimizer, range(1))
    _, other = make(torch.float32, PrincipalWeights(3), density=0.4)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    group = other.param_groups[0]
    assert (group["density"], group["lr"]) == (0.2, 0.5)
    assert group["selection"] == PrincipalWeights(3)
    assert optimizer.param_groups[0]["selection"] == PrincipalWeights(3)


def test_an_unstepped_optimizer_saves_and_loads():
    _, optimizer = make(torch.float32, Magnitude())
    _, other = make(torch.float32, Magnitude())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert not other.state


def _without_group(saved):
    saved["param_groups"].append(saved["param_groups"][0])


def _group_of_another_size(saved):
    saved["param_groups"][0]["params"].pop()


def _foreign(saved):
    del saved["param_groups"][0]["density"]


def _other_selection(saved):
    saved["param_groups"][0]["selection"]["rank"] = 4


def _other_density(saved):
    saved["param_groups"][0]["density"] = 0.31


def _bad_option(saved):
    saved["param_groups"][0]["betas"] = (0.9, 1.5)


def _state(name, change):
    def apply(saved):
        saved["state"][0][name] = change(saved["state"][0][name])

    apply.__name__ = f"{name}_{change.__name__}"
    return apply


def out_of_range(col):
    return torch.cat([col[:-1], torch.tensor([17], dtype=torch.int32)])


def negative(col):
    return torch.cat([torch.tensor([-1], dtype=torch.int32), col[1:]])


def unsorted(col):
    return col.flip(0)


def falling(crow):
    return torch.cat([crow[:1], crow[1:-1].flip(0), crow[-1:]])


def short(value):
    return value[:-1]


def cast(value):
    return value.to(torch.bfloat16)


def missing(value):
    return None


def fraction(value):
    return value + 0.5


def text(value):
    return "not a tensor"


def no_dict(value):
    return []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_group, r"got parameter groups of \[3, 3\] parameters, want \[3\]"),
        (_group_of_another_size, r"got parameter groups of \[2\] parameters"),
        (_foreign, "without density; it is not a checkpoint of this optimizer"),
        (_other_selection, "build the optimizer with the selection of the checkpoint"),
        (_other_density, r"params\[0\]: crow_indices: got .* want 63 of every matrix"),
        (_bad_option, "betas: got"),
        (_state("col_indices", out_of_range), "col_indices: got columns from .* to 17"),
        (_state("col_indices", negative), "col_indices: got columns from -1"),
        (_state("col_indices", unsorted), "want them ascending"),
        (_state("col_indices", short), "the number of col_indices"),
        (_state("col_indices", cast), "col_indices: got dtype bfloat16, want int32"),
        (_state("crow_indices", falling), "crow_indices: got bounds"),
        (_state("crow_indices", short), r"crow_indices: got shape \(12,\), want \(13,\)"),
        (_state("exp_avg", short), r"exp_avg: got shape \(60,\), want \(61,\)"),
        (_state("exp_avg_sq", cast), "exp_avg_sq: got dtype bfloat16, want float32"),
        (_state("exp_avg", text), "exp_avg: got str, want a tensor"),
        (_state("step", fraction), "step: got 2.5, want a count"),
        (_state("selection", no_dict), "selection: got the state of 0 matrices"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_failed_load_changes_nothing(damage, message):
    params, optimizer = make(torch.float32, PrincipalWeights(3))
    run(params, optimizer, range(2))
    saved = through_a_file(optimizer.state_dict())
    damage(saved)
    before = through_a_file(optimizer.state_dict())
    weights = [p.detach().clone() for p in params]
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(saved)
    assert same(before, optimizer.state_dict())
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert all(torch.equal(a, b) for a, b in zip(params, weights, strict=True))
    run(params, optimizer, range(2, 5))


@pytest.mark.parametrize(
    ("saved_dtype", "dtype", "message"),
    [
        (torch.bfloat16, torch.float32, "master"),
        (torch.float32, torch.bfloat16, "master"),
        (torch.float32, torch.float64, "dtype float32, want float64"),
    ],
)
def test_a_checkpoint_of_another_dtype_is_refused(saved_dtype, dtype, message):
    params, optimizer = make(saved_dtype, Magnitude())
    run(params, optimizer, range(1))
    _, other = make(dtype, Magnitude())
    with pytest.raises((TypeError, ValueError), match=message):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_a_checkpoint_of_adamw_is_refused():
    params, optimizer = make(torch.float32, Magnitude())
    with pytest.raises(ValueError, match="not a checkpoint of this optimizer"):
        optimizer.load_state_dict(torch.optim.AdamW(params).state_dict())
