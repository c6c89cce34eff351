"""Selecting: a selection is asked, its CSR installed, and state carried over where both agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from partune import ops
from partune.optim._options import keeps_master, moment_dtype
from partune.selection import Selection
from partune.selection.budget import Layout
from partune.selection.choice import Choice
from partune.selection.half.live import LiveHalf
from partune.selection.protocol import State


def selection_states(state: Mapping[str, Any]) -> list[State]:
    """The selection's own state of every slice; a matrix keeps its one dict as it is."""
    own = state["selection"]
    return own if isinstance(own, list) else [own]


def current_step(state: Mapping[str, Any]) -> int:
    """The number of steps taken, on the host."""
    return int(selection_states(state)[0]["step"]) if "selection" in state else 0


def observe_(
    selection: Selection, parameter: Tensor, grad: Tensor, layout: Layout, states: list[State]
) -> None:
    pairs = zip(layout.matrices(parameter), layout.matrices(grad), strict=True)
    for (matrix, slice_grad), state in zip(pairs, states, strict=True):
        selection.observe_(matrix, slice_grad, state)


def install(
    state: dict[str, Any], choice: Choice, parameter: Tensor, layout: Layout, group: dict[str, Any]
) -> None:
    """Put a choice in force: moments of new entries are 0, their master is the current weight."""
    crow_indices, col_indices = choice.crow_indices, choice.col_indices
    dtype = moment_dtype(parameter, group)
    fresh = {
        name: torch.zeros(col_indices.shape, dtype=dtype, device=parameter.device)
        for name in ("exp_avg", "exp_avg_sq")
    }
    if keeps_master(parameter, group):
        matrix = layout.matrix(parameter.detach())
        fresh["master"] = ops.gather_csr(matrix, crow_indices, col_indices, dtype=torch.float32)
    if "crow_indices" in state:
        carried = [name for name in fresh if name in state]
        state["kept_entries"] = ops.remap_(
            [fresh[name] for name in carried],
            [state[name] for name in carried],
            state["crow_indices"],
            state["col_indices"],
            crow_indices,
            col_indices,
        )
    state.update(fresh, crow_indices=crow_indices, col_indices=col_indices)
    state.setdefault("step", torch.zeros((), dtype=torch.float32, device=parameter.device))
    own = choice.selection_state
    state["parameter_id"] = own[0]["parameter_id"]
    state["selection"] = own if len(own) > 1 else own[0]


def dense_state(parameter: Tensor, group: dict[str, Any], parameter_id: int) -> dict[str, Any]:
    """The state of a parameter that is stepped whole."""

    def zeros() -> Tensor:
        dtype = moment_dtype(parameter, group)
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)

    state: dict[str, Any] = {"exp_avg": zeros(), "exp_avg_sq": zeros()}
    if keeps_master(parameter, group):
        state["master"] = parameter.detach().to(torch.float32, memory_format=torch.preserve_format)
    return {**state, **_count(parameter, parameter_id)}


def half_state(
    parameter: Tensor, group: dict[str, Any], parameter_id: int, half: LiveHalf
) -> dict[str, Any]:
    """The state of a parameter of which rows, columns or elements are live: theirs alone."""

    def zeros() -> Tensor:
        dtype = moment_dtype(parameter, group)
        return torch.zeros(half.shape, dtype=dtype, device=parameter.device)

    state: dict[str, Any] = {"exp_avg": zeros(), "exp_avg_sq": zeros()}
    if keeps_master(parameter, group):
        state["master"] = half.read(parameter.detach()).to(torch.float32)
    return {**state, **_count(parameter, parameter_id)}


def _count(parameter: Tensor, parameter_id: int) -> dict[str, Any]:
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "parameter_id": parameter_id}
