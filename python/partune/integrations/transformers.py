"""transformers' Trainer: sparse layers are refreshed while it trains."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from partune.nn import refresh
from partune.nn._sparse_refresh import check_interval, is_due


class RefreshCallback(TrainerCallback):
    """Call `partune.nn.refresh` every so many of a Trainer's steps.

    The new selection is in force from the 1-based step numbers divisible by `interval`.

    Args:
        interval: optimizer steps between selections, at least 1.

    Raises:
        ValueError: an interval below 1.

    Example:
        >>> callback = RefreshCallback(interval=200)
        >>> # Trainer(attach(model, SparseConfig()), ..., callbacks=[callback])
    """

    def __init__(self, interval: int = 200) -> None:
        check_interval(interval)
        self.interval = interval

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        model: nn.Module = kwargs["model"]
        if is_due(state.global_step, self.interval):
            refresh(model, kwargs["optimizer"])
