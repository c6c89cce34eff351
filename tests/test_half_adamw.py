"""HalfAdamW: frozen entries keep their bits, live ones follow AdamW, and what torch's can do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cuda_emulator import same_bits
from half_models import FAMILIES, LEVELS, loss_of, make, named_toy, put_gradients, weights
from op_cases import assert_close
from partune.optim import HalfAdamW
from partune.selection import Half

SIXTEEN_BIT = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.3}], ids=str)
def test_live_entries_follow_torch_adamw(level: str, options: dict[str, Any]) -> None:
    """On equal gradients, since AdamW treats every entry by itself."""
    mine, theirs = named_toy(), named_toy()
    optimizer = HalfAdamW(mine, lr=1e-2, plan=Half(seed=1, level=level), **options)
    torch_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, **options)
    start = weights(mine)
    for step in range(5):
        put_gradients(mine, step)
        put_gradients(theirs, step)
        optimizer.step()
        torch_optimizer.step()
    frozen = 0
    for (name, parameter), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        live = optimizer.selected(parameter)
        assert same_bits(parameter.detach()[~live], start[name][~live])
        if live.any():
            assert_close(parameter.detach()[live], other.detach()[live])
        frozen += int((~live).sum())
    assert frozen == pytest.approx(sum(p.numel() for p in mine["layers"].parameters()) / 2, rel=0.1)


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX"])
@pytest.mark.parametrize("level", LEVELS)
def test_frozen_entries_keep_their_bits_for_50_steps(family: str, level: str) -> None:
    """With decay, momentum, accumulated gradients and clipping."""
    model = make(family)
    optimizer = HalfAdamW(model, lr=1e-2, weight_decay=0.1, plan=Half(seed=5, level=level))
    start = weights(model)
    for step in range(50):
        for part in range(2):
            loss_of(model, family, 2 * step + part).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    changed = 0
    for name, parameter in model.named_parameters():
        live = optimizer.selected(parameter)
        assert same_bits(parameter.detach()[~live], start[name][~live]), name
        changed += int((parameter != start[name]).sum())
    assert changed > 0.95 * sum(int(optimizer.selected(p).sum()) for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains(family: str) -> None:
    for level in LEVELS:
        model = make(family)
        optimizer = HalfAdamW(model, lr=3e-3, plan=Half(seed=2, level=level))
        losses = []
        for _ in range(4):
            losses.append(loss_of(model, family, 0))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]


def test_whole_matrices_switch_requires_grad_and_autograd_skips_them() -> None:
    model = make("Llama")
    optimizer = HalfAdamW(model, plan=Half(seed=0))
    loss_of(model, "Llama", 0).backward()
    for name, parameter in model.named_parameters():
        live = optimizer.plan.live[name].kind == "all"
        assert parameter.requires_grad is live
        assert (parameter.grad is not None) is live
    optimizer.step()
    assert {id(p) for p in optimizer.state} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


@pytest.mark.parametrize("level", ["rows", "columns", "elements"])
def test_state_is_kept_for_live_entries_alone(level: str) -> None:
    model = make("Llama")
    optimizer = HalfAdamW(model, plan=Half(seed=0, level=level))
    loss_of(model, "Llama", 0).backward()
    optimizer.step()
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert state.keys() == {"exp_avg", "exp_avg_sq", "step", "parameter_id"}
        assert state["exp_avg"].numel() == int(optimizer.selected(parameter).sum())


def test_what_the_user_froze_stays_frozen_and_another_optimizer_may_thaw_a_plan() -> None:
    model = make("Llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    first = HalfAdamW(model, plan=Half(seed=0))
    second = HalfAdamW(model, plan=Half(seed=1))
    assert not model.model.embed_tokens.weight.requires_grad
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            assert parameter.requires_grad is (second.plan.live[name].kind == "all")
    assert first.plan.live != second.plan.live
    second.next_round(2)
    assert not model.model.embed_tokens.weight.requires_grad


# ---- what torch's optimizers can do ----


@pytest.mark.parametrize("level", ["category", "rows", "elements"])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_sixteen_bit_weights_and_a_checkpoint_that_keeps_dtypes(
    level: str, dtype: torch.dtype, masters: bool, state_dtype: torch.dtype | None, tmp_path
) -> None:
    def start() -> tuple[nn.Module, HalfAdamW]:
        model = named_toy(dtype)
        options = {"master_weights": masters, "state_dtype": state_dtype}
        return model, HalfAdamW(model, lr=1e-2, plan=Half(seed=1, level=level), **options)

    model, optimizer = start()
    for step in range(3):
        put_gradients(model, step)
        optimizer.step()
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].dtype == (state_dtype or torch.float32)
        assert ("master" in state) is masters
        if masters:
            live = optimizer.selected(parameter)
            assert same_bits(parameter.detach()[live], state["master"].to(dtype).flatten())
    torch.save(optimizer.state_dict(), tmp_path / "state")
    other, other_optimizer = start()
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        for name, value in optimizer.state.get(a, {}).items():
            if isinstance(value, Tensor):
                assert same_bits(value, other_optimizer.state[b][name])


def test_groups_with_options_of_their_own_and_a_schedule() -> None:
    model, reference = named_toy(), named_toy()
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.dim() > 1], "weight_decay": 0.5},
        {"params": [(n, p) for n, p in named if p.dim() <= 1], "weight_decay": 0.0, "lr": 1e-3},
    ]
    theirs = [
        {"params": [p for p in reference.parameters() if p.dim() > 1], "weight_decay": 0.5},
        {"params": [p for p in reference.parameters() if p.dim() <= 1], "weight_decay": 0.0,
         "lr": 1e-3},
    ]  # fmt: skip
    plan = Half(seed=1, level="rows")
    optimizers = HalfAdamW(groups, lr=1e-2, plan=plan), torch.optim.AdamW(theirs, lr=1e-2)
    assert optimizers[0].plan.live == plan.plan(model).live, "groups make no difference"
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in optimizers]
    for step in range(4):
        put_gradients(model, step)
        put_gradients(reference, step)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        live = optimizers[0].selected(a)
        assert_close(a.detach()[live], b.detach()[live])


def test_a_closure_runs_with_gradients() -> None:
    model = named_toy()
    optimizer = HalfAdamW(model, plan=Half(seed=0))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model["head"](torch.ones(24)).square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert losses[2] < losses[0]


@pytest.mark.parametrize("level", ["category", "elements"])
def test_skip_nonfinite_leaves_out_the_whole_step(level: str) -> None:
    model = named_toy()
    optimizer = HalfAdamW(model, plan=Half(seed=0, level=level), skip_nonfinite=True)
    put_gradients(model, 0)
    optimizer.step()
    start, state = weights(model), copy.deepcopy(optimizer.state_dict())
    put_gradients(model, 1)
    learning = next(p for p in model.parameters() if p.requires_grad)
    learning.grad.view(-1)[-1] = float("nan")
    optimizer.step()
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())
    assert str(optimizer.state_dict()) == str(state)
    put_gradients(model, 1)
    optimizer.step()
    assert {float(s["step"]) for s in optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("level", ["category", "rows", "elements"])
def test_grad_scaler(level: str) -> None:
    plain, scaled = named_toy(), named_toy()
    optimizers = [HalfAdamW(m, lr=1e-2, plan=Half(seed=0, level=level)) for m in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        put_gradients(plain, step)
        optimizers[0].step()
        put_gradients(scaled, step, scale=1024.0)
        scaler.scale(torch.ones(1))  # makes the scale
        scaler.step(optimizers[1])
        scaler.update()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert_close(a.detach(), b.detach())
    before = weights(scaled)
    put_gradients(scaled, 4, scale=float("inf"))
    scaler.step(optimizers[1])
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p, before[n]) for n, p in scaled.named_parameters())


def test_parameters_without_gradients_are_passed_over() -> None:
    model = named_toy()
    optimizer = HalfAdamW(model, plan=Half(seed=0))
    optimizer.step()
    assert not optimizer.state
    model["head"](torch.ones(24)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: got -1.0, want at least 0"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas: got"),
        ({"plan": 3}, TypeError, "plan: got int, want a Half or a HalfPlan"),
        ({"eps_mode": "both"}, ValueError, "eps_mode: got 'both'"),
        ({"amsgrad": True}, ValueError, "amsgrad: got True, which partune doesn't support"),
        ({"fused": True}, ValueError, "fused: got True"),
        ({"capturable": True}, ValueError, "capturable: got True"),
        ({"state_dtype": torch.float16}, TypeError, "state_dtype: got torch.float16"),
        ({"seed": 2**64}, ValueError, "seed: got"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HalfAdamW(named_toy(), **options)


def test_bad_parameters() -> None:
    model = named_toy()
    with pytest.raises(ValueError, match="got parameters without names, by which a plan knows"):
        HalfAdamW(model.parameters())
    with pytest.raises(ValueError, match="no attention or MLP matrix has a name that is known"):
        HalfAdamW(nn.ModuleDict({"head": nn.Linear(2, 2)}))
    optimizer = HalfAdamW(model)
    with pytest.raises(ValueError, match="got one after the plan was drawn"):
        optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(2)))]})
    with pytest.raises(KeyError, match="got one that this optimizer does not have"):
        optimizer.selected(nn.Parameter(torch.ones(2)))
    assert all(p.requires_grad for p in named_toy().parameters())


def test_a_plan_of_another_model_changes_nothing() -> None:
    model = named_toy()
    optimizer = HalfAdamW(model, plan=Half(seed=0))
    flags = [p.requires_grad for p in model.parameters()]
    plan = Half(seed=3).plan(named_toy(layers=3))
    with pytest.raises(ValueError, match="plan: got one of another model, which differs in"):
        optimizer.next_round(plan)
    with pytest.raises(TypeError, match="seed: got 'x', want an int"):
        optimizer.next_round("x")
    assert flags == [p.requires_grad for p in model.parameters()]
    assert optimizer.plan.half.seed == 0


def spoiled(state: dict[str, Any], change: str) -> dict[str, Any]:
    state = copy.deepcopy(state)
    group, one = state["param_groups"][0], next(iter(state["state"].values()))
    if change == "no plan":
        del group["plan"]
    elif change == "another digest":
        group["plan"]["digest"] = "0" * 64
    elif change == "a short moment":
        one["exp_avg"] = one["exp_avg"].flatten()[:-1]
    elif change == "a moment of another dtype":
        one["exp_avg_sq"] = one["exp_avg_sq"].double()
    elif change == "a negative step":
        one["step"] = torch.tensor(-1.0)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no plan", "got no plan, so it is no checkpoint of HalfAdamW"),
        ("another digest", "got a plan that this model doesn't give"),
        ("a short moment", "exp_avg: got shape"),
        ("a moment of another dtype", "exp_avg_sq: got dtype float64, want float32"),
        ("a negative step", "step: got -1.0, want a count"),
    ],
)
@pytest.mark.parametrize("level", ["category", "rows"])
def test_a_failed_load_changes_nothing(level: str, change: str, message: str) -> None:
    model = named_toy()
    optimizer = HalfAdamW(model, plan=Half(seed=1, level=level))
    put_gradients(model, 0)
    optimizer.step()
    saved = spoiled(optimizer.state_dict(), change)
    other = named_toy()
    other_optimizer = HalfAdamW(other, plan=Half(seed=2, level=level))
    before = str(other_optimizer.state_dict())
    flags = [p.requires_grad for p in other.parameters()]
    with pytest.raises((TypeError, ValueError), match=message):
        other_optimizer.load_state_dict(saved)
    assert str(other_optimizer.state_dict()) == before
    assert flags == [p.requires_grad for p in other.parameters()]
