"""Half fine-tuning: half of the parameters learn, drawn anew for each round (arXiv 2404.18466)."""

from partune.selection.half.half import Half
from partune.selection.half.naming import Structure, read_structure
from partune.selection.half.plan import HalfPlan, Live
from partune.selection.half.reset import HalfReset, half_reset_

__all__ = [
    "Half",
    "HalfPlan",
    "HalfReset",
    "Live",
    "Structure",
    "half_reset_",
    "read_structure",
]
