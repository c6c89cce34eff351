"""HalfAdamW's rounds: another half learns, and what both have is carried over."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cuda_emulator import same_bits
from half_models import LEVELS, loss_of, make, named_toy, put_gradients, weights
from partune.optim import HalfAdamW
from partune.selection import Half, HalfPlan

SIXTEEN_BIT = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("one_thread")


def run(
    model: nn.Module, optimizer: HalfAdamW, family: str, steps: range, rounds: dict[int, int]
) -> None:
    for step in steps:
        if step in rounds:
            optimizer.next_round(rounds[step])
        loss_of(model, family, step).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_resuming_between_rounds_gives_the_bits_of_an_uninterrupted_run(
    level: str, dtype: torch.dtype, tmp_path
) -> None:
    def start(seed: int) -> tuple[nn.Module, HalfAdamW]:
        model = make("Phi3").to(dtype)
        options = {} if dtype == torch.float32 else {"master_weights": False}
        return model, HalfAdamW(model, lr=1e-2, plan=Half(seed, level=level), seed=3, **options)

    rounds = {4: 11, 8: 12}
    model, optimizer = start(10)
    run(model, optimizer, "Phi3", range(12), rounds)
    for stop in (3, 4, 8):
        half, half_optimizer = start(10)
        run(half, half_optimizer, "Phi3", range(stop), rounds)
        torch.save([half.state_dict(), half_optimizer.state_dict()], tmp_path / "checkpoint")
        saved = torch.load(tmp_path / "checkpoint", weights_only=True)
        resumed, resumed_optimizer = start(999)  # its round comes with the checkpoint
        resumed.load_state_dict(saved[0])
        resumed_optimizer.load_state_dict(saved[1])
        assert resumed_optimizer.plan == half_optimizer.plan
        run(resumed, resumed_optimizer, "Phi3", range(stop, 12), rounds)
        for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
            assert same_bits(a.detach(), b.detach())
        for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
            mine, theirs = optimizer.state.get(a, {}), resumed_optimizer.state.get(b, {})
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                if isinstance(value, Tensor):
                    assert same_bits(value, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_a_round_carries_state_where_both_agree(level: str, dtype: torch.dtype) -> None:
    model = named_toy(dtype)
    optimizer = HalfAdamW(model, lr=1e-2, plan=Half(seed=1, level=level))
    for step in range(3):
        put_gradients(model, step)
        optimizer.step()

    def dense(name: str, value: str) -> Tensor:
        """State spread over the parameter, NaN where there is none."""
        parameter = dict(model.named_parameters())[name]
        out = torch.full(parameter.shape, float("nan"))
        state = optimizer.state.get(parameter)
        if state and value in state:
            out[optimizer.selected(parameter)] = state[value].flatten()
        return out

    values = ("exp_avg", "exp_avg_sq", *(("master",) if dtype == torch.bfloat16 else ()))
    names = [name for name, _ in model.named_parameters()]
    before = {(name, value): dense(name, value) for name in names for value in values}
    start = weights(model)
    optimizer.next_round(2)
    met = new = 0
    for name, parameter in model.named_parameters():
        live = optimizer.selected(parameter)
        for value in values:
            old, now = before[name, value], dense(name, value)
            assert torch.equal(now.isnan(), ~live)
            both = live & ~old.isnan()
            assert torch.equal(now[both], old[both])
            fresh = start[name].float() if value == "master" else torch.zeros(parameter.shape)
            assert torch.equal(now[live & old.isnan()], fresh[live & old.isnan()])
            met, new = met + int(both.sum()), new + int((live & old.isnan()).sum())
        if live.any():
            assert float(optimizer.state[parameter]["step"]) == 3.0
        else:
            assert parameter not in optimizer.state and not parameter.requires_grad
            assert parameter.grad is None
        assert same_bits(parameter.detach(), start[name])
    assert met > 0 and new > 0
    put_gradients(model, 9)
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


def test_the_first_update_of_what_is_new_in_a_round() -> None:
    """Zero moments beside a bias correction that goes on: lr·(1-β1)/√(1-β2), uncorrected by far."""
    model = named_toy()
    optimizer = HalfAdamW(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, plan=Half(seed=1))
    for step in range(400):
        put_gradients(model, step)
        optimizer.step()
    old = {p for p in model.parameters() if p.requires_grad}
    optimizer.next_round(2)
    start = {p: p.detach().clone() for p in model.parameters()}
    put_gradients(model, 0)
    optimizer.step()
    new = [p for p in model.parameters() if p.requires_grad and p not in old]
    whole = [p for p in new if optimizer.selected(p).all()]
    assert whole
    for parameter in whole:
        moved = (parameter.detach() - start[parameter]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.447e-3), rtol=2e-2, atol=0)


def test_a_round_before_the_first_step_and_back_to_the_same_plan() -> None:
    model = named_toy()
    optimizer = HalfAdamW(model, plan=Half(seed=1))
    optimizer.next_round(2)
    assert not optimizer.state
    put_gradients(model, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.next_round(2)
    after = optimizer.state_dict()
    assert str(before) == str(after)


def test_a_plan_from_a_file_is_a_round() -> None:
    model = named_toy()
    optimizer = HalfAdamW(model, plan=Half(seed=1))
    plan = HalfPlan.from_json(Half(seed=4).plan(model).to_json())
    assert optimizer.next_round(plan) == plan == optimizer.plan
    assert HalfAdamW(named_toy(), plan=plan).plan == plan
