"""A step that is the last one again with new gradients checks nothing anew.

Each test runs beside an optimizer that is loaded from its own checkpoint before every step, which
so never takes the same step again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from half_models import make
from partune import ops
from partune.optim import HalfAdamW, SparseAdamW
from partune.optim._options import named_parameters
from partune.selection import Half, Magnitude, Movement

KINDS = ["category", "rows", "elements", "selected", "watched"]
NORM = "model.norm.weight"
INTERVAL = 4


def optimizer_of(kind: str, model: nn.Module) -> Optimizer:
    """HalfAdamW at a level, or SparseAdamW with a selection that looks at no gradient or at all."""
    if kind in ("selected", "watched"):
        selection = Magnitude() if kind == "selected" else Movement()
        params: Any = model.named_parameters()
        return SparseAdamW(params, lr=0.01, selection=selection, refresh_interval=INTERVAL)
    return HalfAdamW(model, lr=0.01, plan=Half(seed=3, level=kind))


def named(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    return [pair for group in optimizer.param_groups for pair in named_parameters(group)]


def parameter_of(optimizer: Optimizer, name: str) -> Tensor:
    (found,) = (p for own, p in named(optimizer) if own == name)
    return found


def live_matrix(optimizer: Optimizer) -> Tensor:
    return next(p for _, p in named(optimizer) if p.dim() == 2 and p in optimizer.state)


def change_lr(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.05


def change_weight_decay(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.5


def change_betas(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["betas"] = (0.5, 0.6)


def stop_learning(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.0


def drop_a_gradient(optimizer: Optimizer) -> None:
    live_matrix(optimizer).grad = None


def freeze_a_parameter(optimizer: Optimizer) -> None:
    parameter_of(optimizer, NORM).requires_grad_(False)


def replace_a_moment(optimizer: Optimizer) -> None:
    state = optimizer.state[live_matrix(optimizer)]
    state["exp_avg_sq"] = state["exp_avg_sq"] * 4


def drop_a_state(optimizer: Optimizer) -> None:
    optimizer.state.pop(live_matrix(optimizer))


def replace_a_weight(optimizer: Optimizer) -> None:
    parameter = live_matrix(optimizer)
    parameter.data = parameter.data * 2


def transpose_a_gradient(optimizer: Optimizer) -> None:
    parameter = live_matrix(optimizer)
    assert parameter.grad is not None
    parameter.grad = parameter.grad.t().contiguous().t()


CHANGES = [
    change_lr, change_weight_decay, change_betas, stop_learning, drop_a_gradient,
    freeze_a_parameter, replace_a_moment, drop_a_state, replace_a_weight, transpose_a_gradient,
]  # fmt: skip


def put_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        grad = torch.randn(parameter.shape, generator=generator)
        parameter.grad = grad if parameter.requires_grad else None


def assert_same_bits(a: nn.Module, b: nn.Module) -> None:
    for (name, mine), theirs in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_between_steps_counts(kind: str, change: Callable[[Optimizer], None]) -> None:
    models = [make("Llama"), make("Llama")]
    mine, anew = (optimizer_of(kind, m) for m in models)
    for step in range(6):
        for model in models:
            put_gradients(model, step)
        anew.load_state_dict(anew.state_dict())
        if step >= 3:
            change(mine)
            change(anew)
        mine.step()
        anew.step()
        assert_same_bits(*models)


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_changed_step_is_checked_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("Llama")
    optimizer = optimizer_of(kind, model)
    checked: list[str] = []
    for name in ("sparse_adamw_", "half_adamw_"):
        function = getattr(ops, name)

        def counted(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> None:
            checked.append(name)
            function(*args, **kwargs)

        monkeypatch.setattr(ops, name, counted)
    counts = []
    for step in range(6):
        put_gradients(model, step)
        if step == 4:
            replace_a_weight(optimizer)
        checked.clear()
        optimizer.step()
        counts.append(len(checked))
    calls = 2 if kind in ("rows", "elements") else 1
    if kind == "watched":
        assert counts == [1] * 6
    else:
        selects = int(kind == "selected")  # at step INTERVAL
        assert counts == [calls, 0, 0, selects, calls, 0]


def test_a_selection_on_demand_counts() -> None:
    models = [make("Llama"), make("Llama")]
    mine, anew = (optimizer_of("selected", m) for m in models)
    for step in range(3):
        for model, optimizer in zip(models, (mine, anew), strict=True):
            put_gradients(model, step)
            if step == 2:
                assert isinstance(optimizer, SparseAdamW)
                with torch.no_grad():
                    live_matrix(optimizer).copy_(live_matrix(optimizer).roll(1, 0))
                optimizer.select()
        anew.load_state_dict(anew.state_dict())
        mine.step()
        anew.step()
        assert_same_bits(*models)


def test_a_gradient_of_another_layout_is_still_refused() -> None:
    model = make("Llama")
    optimizer = HalfAdamW(model, lr=0.01, plan=Half(seed=3))
    for step in range(2):
        put_gradients(model, step)
        optimizer.step()
    parameter = live_matrix(optimizer)
    assert parameter.grad is not None
    parameter.grad = parameter.grad.to_sparse()
    with pytest.raises(RuntimeError, match="want a dense one"):
        optimizer.step()


def test_a_round_forgets_the_last_step() -> None:
    models = [make("Llama"), make("Llama")]
    mine, anew = (HalfAdamW(m, lr=0.01, plan=Half(seed=3)) for m in models)
    for step in range(6):
        for model, optimizer in zip(models, (mine, anew), strict=True):
            if step == 3:
                optimizer.next_round(4)
            put_gradients(model, step)
        anew.load_state_dict(anew.state_dict())
        mine.step()
        anew.step()
        assert_same_bits(*models)
