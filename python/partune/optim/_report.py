"""What an optimizer selects and how far its last step went, as records and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from partune.optim._functional import update_norm
from partune.optim._options import is_selected, named_parameters


@dataclass(frozen=True)
class ParameterReport:
    """One parameter; `kept_share` is None before its first refresh.

    `update_norm` is the 2-norm of the last update without its decay, at the current lr.
    """

    name: str
    shape: tuple[int, ...]
    selected: int
    density: float
    kept_share: float | None
    update_norm: float


class Report(list[ParameterReport]):
    """A record per parameter; prints as a table."""

    def __str__(self) -> str:
        rows = [("parameter", "shape", "selected", "density", "kept", "update norm")]
        for record in self:
            kept = "" if record.kept_share is None else f"{record.kept_share:.1%}"
            shape = "x".join(map(str, record.shape))
            numbers = (f"{record.selected:,}", f"{record.density:.2%}", kept)
            rows.append((record.name, shape, *numbers, f"{record.update_norm:.3g}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        )


def report(
    param_groups: Sequence[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]]
) -> Report:
    """The records of all groups, in their order."""
    return Report(
        _record(name, parameter, group, states.get(parameter, {}))
        for group in param_groups
        for name, parameter in named_parameters(group)
    )


def _record(
    name: str, parameter: Tensor, group: dict[str, Any], state: Mapping[str, Any]
) -> ParameterReport:
    if is_selected(parameter, group):
        selected = state["col_indices"].numel() if "col_indices" in state else 0
    else:
        selected = parameter.numel()
    kept = state.get("kept_entries")
    norm = 0.0
    if state:
        norm = update_norm(
            state["exp_avg"],
            state["exp_avg_sq"],
            float(state["step"]),
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            eps_mode=group["eps_mode"],
        )
    return ParameterReport(
        name=name,
        shape=tuple(parameter.shape),
        selected=selected,
        density=selected / max(parameter.numel(), 1),
        kept_share=None if kept is None else int(kept) / max(selected, 1),
        update_norm=norm,
    )
