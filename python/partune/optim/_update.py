"""What a step does to the parameters: who takes part, what is chosen, which op calls follow."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partune import ops
from partune.ops.csr import Csr
from partune.optim._functional import StepOptions, half_adamw, sparse_adamw
from partune.optim._options import is_selected, named_parameters
from partune.optim._refresh import (
    current_step,
    dense_state,
    half_state,
    install,
    observe_,
    selection_states,
)
from partune.selection.budget import Layout
from partune.selection.choice import Choice, choose, initial_states
from partune.selection.half.live import LiveHalf
from partune.selection.protocol import State, observes


@dataclass
class Update:
    """One parameter's part in a step; `state` is empty before its first."""

    name: str
    parameter: Tensor
    grad: Tensor | None
    group: dict[str, Any]
    state: dict[str, Any]
    parameter_id: int
    half: LiveHalf | None = None
    choice: Choice | None = None
    observed: bool = False

    def __post_init__(self) -> None:
        self.selected = is_selected(self.parameter, self.group)

    @property
    def due(self) -> bool:
        """Whether this step selects."""
        if not self.selected or "crow_indices" not in self.state:
            return self.selected
        interval = self.group["refresh_interval"]
        return bool(interval) and (current_step(self.state) + 1) % interval == 0

    @property
    def csr(self) -> Csr:
        """The entries to step, those of a choice not yet in force included; both empty: all."""
        if self.choice is not None:
            return self.choice.crow_indices, self.choice.col_indices
        if self.selected:
            return self.state["crow_indices"], self.state["col_indices"]
        nothing = torch.empty(0, dtype=torch.int32, device=self.parameter.device)
        return nothing.to(torch.int64), nothing

    def readable_grad(self) -> Tensor:
        """The gradient as the op reads it: copied only where its strides are not the parameter's.

        Raises:
            RuntimeError: a sparse gradient, as from torch.optim.AdamW.
        """
        grad, parameter = self.grad, self.parameter
        assert grad is not None
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{self.name}: got a gradient of layout {grad.layout}, want a dense one; build the "
                "embedding with sparse=False"
            )
        if self.selected:
            return grad if grad.dim() == 2 else grad.contiguous()
        if grad.stride() == parameter.stride() or grad.numel() <= 1:
            return grad
        return torch.empty_like(parameter, dtype=grad.dtype).copy_(grad)

    def followed_grad(self, grad_scale: Tensor | None) -> Tensor:
        """The gradient as selections see it: unscaled, and negated to maximize."""
        grad = self.grad
        assert grad is not None
        if grad_scale is not None:
            grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
            grad = grad / grad_scale.to(grad.device)
        return -grad if self.group["maximize"] else grad

    def states(self) -> list[State]:
        """The selection's own states, those of a first step not yet kept."""
        if "selection" in self.state:
            return selection_states(self.state)
        layout = Layout.of(self.parameter)
        return initial_states(self.group["selection"], self.parameter, layout, self.parameter_id)


def collect_updates(
    param_groups: Sequence[dict[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
    halves: Mapping[Tensor, LiveHalf] | None = None,
) -> list[Update]:
    """Every parameter once, with the ordinal of its first matrix."""
    updates: list[Update] = []
    seen: set[Tensor] = set()
    parameter_id = 0
    for group in param_groups:
        for name, parameter in named_parameters(group):
            if parameter in seen:
                continue
            seen.add(parameter)
            state = states.get(parameter, {})
            half = None if halves is None else halves.get(parameter)
            grad = parameter.grad
            updates.append(Update(name, parameter, grad, group, state, parameter_id, half))
            parameter_id += parameter.shape[0] if parameter.dim() == 3 else 1
    return updates


def with_gradient(updates: Sequence[Update]) -> list[Update]:
    """Those that this step concerns: a gradient, and not lr 0 with a gradient of zeros."""
    concerned = []
    idle = {id(u.group): is_known_zero(u.group["lr"]) for u in updates}
    for update in updates:
        if update.grad is not None:
            update.grad = update.readable_grad()
            if not (idle[id(update.group)] and not update.grad.any()):
                concerned.append(update)
    return concerned


def is_known_zero(lr: float | Tensor) -> bool:
    """Whether a rate is 0, as far as one can tell without waiting for a device."""
    return (not isinstance(lr, Tensor) or reads_at_once(lr.device)) and float(lr) == 0


def reads_at_once(device: torch.device) -> bool:
    """Whether the host reads a tensor's numbers without waiting for a device."""
    return device.type == "cpu"


def correct_counts(updates: Sequence[Update]) -> None:
    """Take the number of steps from the device where a selection seems to be due.

    The host counts a step before it knows whether the step was left out, so it may count too many.
    """
    for update in updates:
        if update.due and update.state and not reads_at_once(update.parameter.device):
            for state in selection_states(update.state):
                state["step"] = int(update.state["step"])


def must_know(updates: Sequence[Update]) -> bool:
    """Whether the host has to know at once if the step counts: to select, or to show gradients."""
    devices = {update.parameter.device for update in updates}
    if len(devices) != 1 or any(reads_at_once(device) for device in devices):
        return True
    return any(u.due or (u.selected and observes(u.group["selection"])) for u in updates)


def _observe(update: Update, states: list[State], grad_scale: Tensor | None) -> None:
    """Count the step in the selection's own states and show it the gradient."""
    for state in states:
        state["step"] += 1
    selection = update.group["selection"]
    update.observed = True
    if observes(selection):
        grad = update.followed_grad(grad_scale)
        observe_(selection, update.parameter, grad, Layout.of(update.parameter), states)


def choose_in_step(update: Update, grad_scale: Tensor | None, *, revocable: bool) -> None:
    """Make this step's choice; a revocable one leaves the state as it is until it is installed."""
    states = update.states()
    states = copy.deepcopy(states) if revocable else [dict(state) for state in states]
    _observe(update, states, grad_scale)
    _choose(update, update.followed_grad(grad_scale), states)


def choose_on_demand(update: Update) -> None:
    """Make a choice between steps."""
    grad = None if update.grad is None else update.followed_grad(None)
    _choose(update, grad, [dict(state) for state in update.states()])


def _choose(update: Update, grad: Tensor | None, states: list[State]) -> None:
    layout = Layout.of(update.parameter)
    k, block = layout.selected_per_slice(update.group), update.group["block"]
    selection = update.group["selection"]
    update.choice = choose(selection, update.parameter, grad, layout, states, k, block)


def install_choice(update: Update, states: dict[Tensor, dict[str, Any]]) -> None:
    """Put a pending choice in force, where there is one."""
    if update.choice is not None:
        update.state = states[update.parameter]
        layout = Layout.of(update.parameter)
        install(update.state, update.choice, update.parameter, layout, update.group)
        update.choice = None


def prepare_state(
    update: Update, states: dict[Tensor, dict[str, Any]], grad_scale: Tensor | None
) -> None:
    """Bring a parameter's state to where its entries can be stepped."""
    install_choice(update, states)
    if update.selected:
        if not update.observed:
            _observe(update, selection_states(update.state), grad_scale)
    elif not update.state:
        parameter, group = update.parameter, update.group
        update.state = states[parameter]
        if update.half is None:
            update.state.update(dense_state(parameter, group, update.parameter_id))
        else:
            update.state.update(half_state(parameter, group, update.parameter_id, update.half))


def nonfinite_flags(updates: Sequence[Update]) -> dict[torch.device, Tensor]:
    """By device: 1 where a gradient entry that is to be stepped is NaN or infinite, else 0."""
    flags: dict[torch.device, Tensor] = {}
    alike: dict[tuple[Any, ...], list[Update]] = {}
    for update in updates:
        assert update.grad is not None
        alike.setdefault((update.grad.device, update.grad.dtype), []).append(update)
    for (device, _), members in alike.items():
        flag = flags.setdefault(device, torch.zeros((), device=device))
        crow_indices, col_indices = zip(*(u.csr for u in members), strict=True)
        grads = [u.grad for u in members if u.grad is not None]
        ops.found_inf_(flag, grads, crow_indices, col_indices)
    return flags


class Call:
    """One call of an op: parameters of a group that are alike in dtypes and level, their state."""

    def __init__(self, members: Sequence[Update]) -> None:
        self.group = members[0].group
        self.parameters = [u.parameter for u in members]
        self.states = [u.state for u in members]
        self._lists = (
            [u.state["exp_avg"] for u in members],
            [u.state["exp_avg_sq"] for u in members],
            [u.state["master"] for u in members if "master" in u.state],
            [u.state["step"] for u in members],
            [u.state["parameter_id"] for u in members],
        )
        self._halves = [u.half for u in members if u.half is not None]
        csrs = [] if self._halves else [u.csr for u in members]
        self._crow_indices = [crow_indices for crow_indices, _ in csrs]
        self._col_indices = [col_indices for _, col_indices in csrs]

    def run(
        self,
        grads: Sequence[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        *,
        again: bool = False,
    ) -> None:
        """Count the step and take it; where found_inf isn't 0, nothing is written.

        Args:
            again: the same call has been made before with gradients alike: not checked again.
        """
        group = self.group
        options: StepOptions = {
            "lr": group["lr"], "betas": group["betas"], "weight_decay": group["weight_decay"],
            "eps": group["eps"], "eps_mode": group["eps_mode"], "maximize": group["maximize"],
            "seed": group["seed"], "grad_scale": grad_scale, "found_inf": found_inf,
            "again": again,
        }  # fmt: skip
        if self._halves:
            half_adamw(self.parameters, grads, self._halves, *self._lists, **options)
        else:
            csrs = (self._crow_indices, self._col_indices)
            sparse_adamw(self.parameters, grads, *csrs, *self._lists, **options)


def step_all(
    updates: Sequence[Update], grad_scale: Tensor | None, found_inf: Tensor | None
) -> list[Call]:
    """One call per group and combination of dtypes; where found_inf isn't 0, nothing is written."""
    alike: dict[tuple[Any, ...], list[Update]] = {}
    for update in updates:
        assert update.grad is not None
        parameter, state = update.parameter, update.state
        key = (id(update.group), parameter.device, parameter.dtype, update.grad.dtype)
        level = None if update.half is None else update.half.level
        alike.setdefault((*key, state["exp_avg"].dtype, "master" in state, level), []).append(
            update
        )
    calls = []
    for members in alike.values():
        calls.append(Call(members))
        calls[-1].run([u.grad for u in members if u.grad is not None], grad_scale, found_inf)
    return calls
