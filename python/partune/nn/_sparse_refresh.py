"""Selecting anew while training: `refresh`, and what calls it every so many steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from partune.nn._sparse_entries import SparseEntries, write_all_
from partune.nn._sparse_layers import check_selection
from partune.nn._sparse_writing import written_weights
from partune.selection import Selection


@torch.no_grad()
def refresh(model: nn.Module, optimizer: Optimizer, *, selection: Selection | None = None) -> float:
    """Select anew from the weights as they are now, in all active sparse layers of a model.

    Between steps: after `optimizer.step()`, before the next forward. Whatever of the optimizer's
    state has an entry for each value (AdamW's two moments, SGD's momentum) stays where the old and
    the new selection meet and starts from zero elsewhere, as accumulated gradients do; step counts
    go on. Deselected weights keep their trained value, and `detach` still restores them.

    Args:
        optimizer: that trains the values.
        selection: another one than the config's, from now on.

    Returns:
        The share of the entries that were selected before, too.

    Raises:
        TypeError: an optimizer whose state is quantised; no selection.
        ValueError: no active sparse layers; an optimizer that has none of their values; a selection
            by gradients, or one that refuses a weight. Then nothing is changed.

    Reference: LIFT (arXiv 2506.00772), section 3.

    Example:
        >>> from partune.nn import SparseConfig, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 8)), SparseConfig(density=0.25))
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        >>> model(torch.ones(4)).sum().backward(); optimizer.step()
        >>> 0.0 <= refresh(model, optimizer) <= 1.0
        True
    """
    if selection is not None:
        check_selection(selection)
    weights = written_weights(model)
    followers = {entries: _followers(entries, optimizer) for entries in weights}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(entries.values) in trained for entries in weights):
        raise ValueError(
            "optimizer: got one without any of the model's values; want the one that trains them"
        )
    write_all_(weights.items())
    choices = {
        entries: entries.choose(
            weight, selection or entries.selection, _next_step(entries, optimizer)
        )
        for entries, weight in weights.items()
    }
    kept = total = 0
    for entries, choice in choices.items():
        entries.selection = selection or entries.selection
        kept += entries.reselect_(weights[entries], choice, followers[entries])
        total += entries.values.numel()
    return kept / max(total, 1)


def _followers(entries: SparseEntries, optimizer: Optimizer) -> list[Tensor]:
    """What has an entry for each value: its gradient, and the optimizer's state."""
    values = entries.values
    followers = [] if values.grad is None else [values.grad]
    for name, value in optimizer.state.get(values, {}).items():
        if isinstance(value, Tensor) and value.shape == values.shape:
            if not value.is_floating_point():
                raise TypeError(
                    f"optimizer: its {name} is {value.dtype}, which can't be carried over to "
                    "another selection; want an optimizer with floating-point state, such as "
                    "torch.optim.AdamW"
                )
            followers.append(value)
    return followers


def _next_step(entries: SparseEntries, optimizer: Optimizer) -> int:
    """The number of the step that the next selection is for, from 1."""
    steps = optimizer.state.get(entries.values, {}).get("step")
    last = max((int(state["step"]) for state in entries.selection_state), default=1)
    return last + 1 if steps is None else int(steps) + 1


class Refresher:
    """Call `refresh` every so many steps; used like a learning-rate scheduler.

    The new selection is in force from the 1-based step numbers divisible by `interval`, as in
    `partune.optim.SparseAdamW`.

    Args:
        model, optimizer: as for `refresh`.
        interval: steps between selections, at least 1.

    Raises:
        ValueError: an interval below 1.

    Example:
        >>> from partune.nn import SparseConfig, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 8)), SparseConfig(density=0.25))
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        >>> refresher = Refresher(model, optimizer, interval=2)
        >>> for _ in range(4):
        ...     model(torch.ones(4)).sum().backward(); optimizer.step(); refresher.step()
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, interval: int = 200) -> None:
        check_interval(interval)
        self.model, self.optimizer, self.interval = model, optimizer, interval
        self.steps = 0

    def step(self) -> None:
        """Count a step of the optimizer, and refresh where the next one needs it."""
        self.steps += 1
        if is_due(self.steps, self.interval):
            refresh(self.model, self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "interval": self.interval}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.steps, self.interval = int(state_dict["steps"]), int(state_dict["interval"])


def check_interval(interval: object) -> None:
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
        raise ValueError(f"interval: got {interval!r}, want a number of steps of at least 1")


def is_due(steps: int, interval: int) -> bool:
    """Whether to refresh after this many steps."""
    return (steps + 1) % interval == 0
