"""What a parameter group may say, and the number of entries that it selects."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from partune.ops._checks import COLUMN_LIMIT, FLOATING, one_of, without_gaps
from partune.ops._sparse_adamw_checks import EPS_MODES
from partune.selection import Selection
from partune.selection.budget import Block, Layout, check_block, check_budget

_COMPACT_LIMIT = 2 / 3  # 12 bytes per selected entry against AdamW's 8 per entry
_UNSUPPORTED = ("amsgrad", "foreach", "capturable", "differentiable", "fused")


def is_selected(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter is stepped by selected entries, not densely."""
    return group.get("selection") is not None and parameter.dim() >= 2 and parameter.numel() > 0


def keeps_master(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    sixteen_bit = parameter.dtype in (torch.bfloat16, torch.float16)
    return sixteen_bit and group["master_weights"] is not False


def moment_dtype(parameter: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return group["state_dtype"] or wide


def check_options(group: Mapping[str, Any]) -> None:
    """Check everything in a group but its parameters."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr: got a tensor of shape {tuple(lr.shape)}, want one element")
    for name, value in (("lr", lr), ("eps", group["eps"]), ("weight_decay", group["weight_decay"])):
        if not float(value) >= 0.0:
            raise ValueError(f"{name}: got {value}, want at least 0")
    if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"betas: got {betas}, want two numbers, each 0 <= beta < 1")
    one_of("eps_mode", group["eps_mode"], EPS_MODES)
    if "selection" in group:
        _check_selection(group)
    if group["state_dtype"] not in (None, torch.float32, torch.float64, torch.bfloat16):
        raise TypeError(f"state_dtype: got {group['state_dtype']}, want None or torch.bfloat16")
    if not isinstance(group["seed"], int) or not -(2**63) <= group["seed"] < 2**63:
        raise ValueError(f"seed: got {group['seed']!r}, want an int of 64 bits")
    for name in _UNSUPPORTED:
        if group[name]:
            raise ValueError(
                f"{name}: got {group[name]!r}, which partune doesn't support; leave it"
            )


def _check_selection(group: Mapping[str, Any]) -> None:
    selection = group["selection"]
    if selection is not None and (
        not isinstance(selection, Selection) or isinstance(selection, type)
    ):
        raise TypeError(
            f"selection: got {selection!r}, want None or an object with init, observe_ and "
            "propose, for example partune.selection.PrincipalWeights(rank=128)"
        )
    check_budget(group["density"], group["budget_rank"])
    check_block(group["block"])
    interval = group["refresh_interval"]
    if interval is not None and (not isinstance(interval, int) or interval < 0):
        raise ValueError(f"refresh_interval: got {interval!r}, want steps, or None for never")


def check_parameters(group: Mapping[str, Any], explicit: bool) -> None:
    """Check that a group's parameters can be stepped; `explicit`: it names its own selection."""
    for name, parameter in named_parameters(group):
        if parameter.dtype not in FLOATING or parameter.layout != torch.strided:
            raise TypeError(
                f"{name}: got {parameter.dtype}, {parameter.layout}, want a strided parameter of "
                "float64, float32, bfloat16 or float16"
            )
        if explicit and parameter.dim() < 2:
            raise ValueError(
                f"{name}: got shape {tuple(parameter.shape)} in a group with a selection, which "
                "takes matrices; put it into a group with selection=None"
            )
        if moment_dtype(parameter, group) not in _moment_dtypes(parameter):
            raise TypeError(
                f"state_dtype: got {group['state_dtype']} for {name} of {parameter.dtype}, "
                "want None"
            )
        if is_selected(parameter, group):
            _check_matrix(name, parameter, group["block"])
        else:
            without_gaps(name, parameter)


def _moment_dtypes(parameter: Tensor) -> tuple[torch.dtype, ...]:
    if parameter.dtype == torch.float64:
        return (torch.float64,)
    return (torch.float32, torch.bfloat16)


def _check_matrix(name: str, parameter: Tensor, block: Block) -> None:
    if parameter.dim() > 2 and not parameter.is_contiguous():
        raise ValueError(
            f"{name}: got strides {parameter.stride()} for shape {tuple(parameter.shape)}, want a "
            "contiguous parameter, or selection=None"
        )
    layout = Layout.of(parameter)
    if layout.columns >= COLUMN_LIMIT:
        raise ValueError(
            f"{name}: got shape {tuple(parameter.shape)}, want fewer than 2**31 columns"
        )
    try:
        layout.check_divided_by(block)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def warn_about_budget(group: Mapping[str, Any]) -> None:
    """Warn of selections that hold nothing, or more state than AdamW would."""
    empty, large = [], []
    for name, parameter in named_parameters(group):
        if is_selected(parameter, group):
            layout = Layout.of(parameter)
            k = layout.selected_per_slice(group)
            if k == 0:
                empty.append(name)
            elif k > _COMPACT_LIMIT * layout.entries:
                large.append(name)
    for names, consequence in (
        (empty, "no entries are selected, so they do not train; raise density or budget_rank"),
        (large, "compact state takes more memory than a dense optimizer's; use selection=None"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            warnings.warn(f"{names[0]}{more}: {consequence}", stacklevel=5)


def named_parameters(group: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The group's parameters with their names, or with their positions where they have none."""
    names = group.get("param_names") or [f"params[{i}]" for i in range(len(group["params"]))]
    return list(zip(names, group["params"], strict=True))
