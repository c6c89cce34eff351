"""Checkpoints: selections as plain data on the way out, everything checked on the way in."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from partune.ops import _checks as check
from partune.ops.csr import validate_csr
from partune.optim._options import (
    check_options,
    check_parameters,
    is_selected,
    keeps_master,
    moment_dtype,
    named_parameters,
)
from partune.selection import Selection
from partune.selection.budget import Layout
from partune.selection.half.live import LiveHalf
from partune.selection.protocol import describe


@contextmanager
def plain_selections(param_groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Describe the groups' selections by plain data for as long as the context lasts."""
    selections = [group["selection"] for group in param_groups]
    try:
        for group, selection in zip(param_groups, selections, strict=True):
            group["selection"] = _description(selection)
        yield
    finally:
        for group, selection in zip(param_groups, selections, strict=True):
            group["selection"] = selection


def _description(selection: Selection | None) -> dict[str, Any] | None:
    return None if selection is None else describe(selection)


def restore(
    param_groups: Sequence[dict[str, Any]],
    state_dict: Mapping[str, Any],
    halves: Mapping[Tensor, LiveHalf] | None = None,
) -> dict[str, Any]:
    """The groups and the state of a checkpoint, as new objects; errors name what doesn't fit."""
    saved_groups = copy.deepcopy(state_dict["param_groups"])
    sizes = [len(group["params"]) for group in param_groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict: got parameter groups of {saved_sizes} parameters, want {sizes}"
        )
    saved_ids = list(chain.from_iterable(group["params"] for group in saved_groups))
    groups = [_restore_group(*pair) for pair in zip(param_groups, saved_groups, strict=True)]
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    members = [(group, *named) for group in groups for named in named_parameters(group)]
    known = dict(zip(saved_ids, members, strict=True))
    for saved_id, saved in state_dict["state"].items():
        if saved_id not in known:
            state[saved_id] = saved
        elif saved:
            group, name, parameter = known[saved_id]
            try:
                half = None if halves is None else halves.get(parameter)
                state[parameter] = _restore_state(parameter, group, saved, half)
            except (TypeError, ValueError) as error:
                raise type(error)(f"state_dict, {name}: {error}") from None
    return {"state": state, "param_groups": groups}


def _restore_group(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The saved options with our own parameters and selection."""
    missing = group.keys() - saved.keys() - {"param_names"}
    if missing:
        raise ValueError(
            f"state_dict: got a group without {', '.join(sorted(missing))}; it is not a checkpoint "
            "of this optimizer"
        )
    restored = {**saved, "params": group["params"]}
    if "selection" in group:
        wanted = _description(group["selection"])
        if saved["selection"] != wanted:
            raise ValueError(
                f"state_dict: got a selection {saved['selection']}, want {wanted}; build the "
                "optimizer with the selection of the checkpoint"
            )
        restored["selection"] = group["selection"]
    if "param_names" in group:
        restored.setdefault("param_names", group["param_names"])
    check_options(restored)
    check_parameters(restored, explicit=False)
    return restored


def _restore_state(
    parameter: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any], half: LiveHalf | None
) -> dict[str, Any]:
    selected, master = is_selected(parameter, group), keeps_master(parameter, group)
    names = {"exp_avg", "exp_avg_sq", "step", "parameter_id"}
    names |= {"crow_indices", "col_indices", "selection"} if selected else set()
    names |= {"master"} if master else set()
    if saved.keys() - {"kept_entries"} != names:
        raise ValueError(f"got state {sorted(saved)}, want {sorted(names)}")
    step = saved["step"]
    check.scalar("step", step, (torch.float32,), None)
    check.parameter_id("parameter_id", saved["parameter_id"])
    if not (float(step) >= 0 and float(step).is_integer()):
        raise ValueError(f"step: got {float(step)}, want a count")
    if selected:
        _check_csr(Layout.of(parameter), group, saved["crow_indices"], saved["col_indices"])
    whole = parameter.shape if half is None else half.shape
    shape = saved["col_indices"].shape if selected else whole
    moments = {
        "exp_avg": moment_dtype(parameter, group),
        "exp_avg_sq": moment_dtype(parameter, group),
    }
    for name, dtype in {**moments, **({"master": torch.float32} if master else {})}.items():
        check.tensor(name, saved[name], None)
        check.shape(name, saved[name], shape)
        check.dtype(name, saved[name], (dtype,))
    if selected:
        _check_selection_state(parameter, group["selection"], saved["selection"], int(step))
    restored: dict[str, Any] = _copied(saved, parameter.device)
    if not selected and half is None:
        for name in names - {"step", "parameter_id"}:
            like = torch.empty_like(parameter, dtype=saved[name].dtype)
            restored[name] = like.copy_(saved[name])
    return restored


def _check_csr(
    layout: Layout, group: Mapping[str, Any], crow_indices: Tensor, col_indices: Tensor
) -> None:
    """A CSR in range, with exactly k entries of every slice."""
    validate_csr(crow_indices, col_indices, layout.slices * layout.rows, layout.columns)
    per_slice = crow_indices[:: layout.rows].diff()
    k = layout.selected_per_slice(group)
    if bool((per_slice != k).any()):
        raise ValueError(
            f"crow_indices: got {per_slice.tolist()} entries, want {k} of every matrix"
        )


def _check_selection_state(parameter: Tensor, selection: Selection, saved: Any, step: int) -> None:
    """The selection's own state has the entries that it has at its start, of the same form."""
    layout = Layout.of(parameter)
    slices = saved if isinstance(saved, list) else [saved]
    if len(slices) != layout.slices:
        raise ValueError(
            f"selection: got the state of {len(slices)} matrices, want {layout.slices}"
        )
    for matrix, state in zip(layout.matrices(parameter), slices, strict=True):
        wanted = {**selection.init(matrix), "parameter_id": 0, "step": step}
        if not isinstance(state, dict) or state.keys() != wanted.keys() or state["step"] != step:
            raise ValueError(
                f"selection: got state {state!r}, want {sorted(wanted)} at step {step}"
            )
        for name, value in wanted.items():
            if isinstance(value, Tensor):
                check.tensor(f"selection, {name}", state[name], None)
                check.shape(f"selection, {name}", state[name], value.shape)
                check.dtype(f"selection, {name}", state[name], (value.dtype,))


def _copied(value: Any, device: torch.device) -> Any:
    """A deep copy, tensors on the device and of the dtype that they have."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: _copied(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item, device) for item in value]
    return copy.deepcopy(value)
