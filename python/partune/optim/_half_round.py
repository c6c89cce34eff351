"""From one round of HFT to the next: what is kept of a parameter's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from partune.optim._options import keeps_master
from partune.optim._refresh import dense_state, half_state
from partune.selection.half.live import LiveHalf

Extent = LiveHalf | bool  # what of a parameter is live: part, all or nothing of it


def carry_state(
    state: Mapping[str, Any],
    parameter: Tensor,
    group: dict[str, Any],
    parameter_id: int,
    taken: float,
    before: Extent,
    after: Extent,
) -> dict[str, Any]:
    """The state of a parameter in a new round; empty where it has none, or none yet.

    Args:
        taken: the number of steps that the optimizer has taken.
    """
    never_stepped = before is not False and not state
    if after is False or never_stepped or taken == 0:
        return {}
    if before is True and after is True:
        return dict(state)
    if after is True:
        new = dense_state(parameter, group, parameter_id)
    else:
        assert isinstance(after, LiveHalf)
        new = half_state(parameter, group, parameter_id, after)
    new["step"].fill_(float(state["step"]) if state else taken)
    for name in ("exp_avg", "exp_avg_sq", "master") if state else ():
        if name == "master" and not keeps_master(parameter, group):
            continue
        new[name] = _carried(state[name], name, parameter, before, after)
    return new


def _carried(old: Tensor, name: str, parameter: Tensor, before: Extent, after: Extent) -> Tensor:
    """Values where both rounds are live; else a moment is 0 and a master the weight."""
    start = parameter.detach() if name == "master" else torch.zeros_like(parameter)
    dense = start.to(old.dtype)
    dense = before.spread(old, dense) if isinstance(before, LiveHalf) else old
    if isinstance(after, LiveHalf):
        return after.read(dense)
    return torch.empty_like(parameter, dtype=old.dtype).copy_(dense)
