"""HalfAdamW: frozen entries keep their bits, live ones follow AdamW; rounds and checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cuda_emulator import same_bits
from half_models import FAMILIES, loss_of, make
from op_cases import assert_close
from partune.optim import HalfAdamW
from partune.selection import Half, HalfPlan

LEVELS = ("category", "layer", "model", "rows", "columns", "elements")
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread makes models of this size slower, on a busy machine fifty times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def named_toy(dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Module:
    """Attention with a fused matrix, an MLP, norms, a head, by names that are known."""

    def block() -> nn.Module:
        return nn.ModuleDict({
            "self_attn": nn.ModuleDict(
                {"qkv_proj": nn.Linear(24, 72), "o_proj": nn.Linear(24, 24)}
            ),
            "mlp": nn.ModuleDict({"fc1": nn.Linear(24, 40), "fc2": nn.Linear(40, 24)}),
            "ln_1": nn.LayerNorm(24), "ln_2": nn.LayerNorm(24),
        })  # fmt: skip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ModuleDict({
            "layers": nn.ModuleList([block() for _ in range(layers)]), "head": nn.Linear(24, 5),
        })  # fmt: skip
    return model.to(dtype)


def put_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        grad = torch.randn(parameter.shape, generator=generator) * scale
        if parameter.requires_grad:
            parameter.grad = grad.to(parameter.dtype)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


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


# ---- rounds ----


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
