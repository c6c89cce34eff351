"""Modules, and adapters for whole models: attach, train, merge."""

from partune.nn._checkpoint import load_adapter, save_adapter
from partune.nn._merge import MergeReport, merge
from partune.nn._registry import (
    attach,
    detach,
    fingerprint,
    print_trainable_parameters,
    set_adapter,
    trainable_parameters,
)
from partune.nn._scale_shift_config import ScaleShiftConfig
from partune.nn.scale_shift import ScaleShift

__all__ = [
    "MergeReport",
    "ScaleShift",
    "ScaleShiftConfig",
    "attach",
    "detach",
    "fingerprint",
    "load_adapter",
    "merge",
    "print_trainable_parameters",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
]
