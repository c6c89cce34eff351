"""What autocast asks of an op that is one node of the graph, as torch's linear is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_is_on(value: Tensor) -> bool:
    """On the device of a tensor; of the meta device autocast doesn't know."""
    device = "cpu" if value.is_cpu else value.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What autocast casts a linear's input to, if it does."""
    if input.dtype == torch.float64 or not autocast_is_on(input):
        return None
    return torch.get_autocast_dtype(input.device.type)


def without_autocast(value: Tensor) -> AbstractContextManager[Any]:
    """Only where it is on: entering and leaving takes as long as a small product."""
    if autocast_is_on(value):
        return torch.autocast(value.device.type, enabled=False)
    return nullcontext()
