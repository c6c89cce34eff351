"""Modules, and adapters for whole models: attach, train, merge."""

from partune.nn._block_lora_config import BlockLoRAConfig
from partune.nn._block_lora_layers import BlockLoRALinear
from partune.nn._checkpoint import load_adapter, save_adapter
from partune.nn._merge import MergeReport, merge, unmerge
from partune.nn._mixed import mixed_adapters
from partune.nn._registry import (
    attach,
    detach,
    disable_adapter,
    fingerprint,
    print_trainable_parameters,
    set_adapter,
    trainable_parameters,
)
from partune.nn._scale_shift_config import ScaleShiftConfig
from partune.nn._sparse_config import SparseConfig
from partune.nn._sparse_layers import SparseLinear
from partune.nn._sparse_refresh import Refresher, refresh
from partune.nn._sparse_writing import write_back_
from partune.nn.block_lora import BlockLoRA
from partune.nn.scale_shift import ScaleShift

__all__ = [
    "BlockLoRA",
    "BlockLoRAConfig",
    "BlockLoRALinear",
    "MergeReport",
    "Refresher",
    "ScaleShift",
    "ScaleShiftConfig",
    "SparseConfig",
    "SparseLinear",
    "attach",
    "detach",
    "disable_adapter",
    "fingerprint",
    "load_adapter",
    "merge",
    "mixed_adapters",
    "print_trainable_parameters",
    "refresh",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "unmerge",
    "write_back_",
]
