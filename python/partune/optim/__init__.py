"""Optimizers that train a selection of the weights."""

from partune.optim.half import HalfAdamW
from partune.optim.lift import LiftAdamW, lift_groups
from partune.optim.sparse_adamw import SparseAdamW

__all__ = ["HalfAdamW", "LiftAdamW", "SparseAdamW", "lift_groups"]
