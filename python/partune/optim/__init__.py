"""Optimizers that train a selection of the weights."""

from partune.optim.lift import LiftAdamW, lift_groups
from partune.optim.sparse_adamw import SparseAdamW

__all__ = ["LiftAdamW", "SparseAdamW", "lift_groups"]
