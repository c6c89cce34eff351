"""Which weights train: selections propose scores, the core picks the k best of each matrix."""

from partune.selection.half import Half, HalfPlan, HalfReset, half_reset_
from partune.selection.principal import PrincipalWeights
from partune.selection.protocol import Factors, Proposal, Scores, Selection
from partune.selection.scores import GradientMagnitude, Magnitude, Movement, Random
from partune.selection.topk import topk_csr

__all__ = [
    "Factors",
    "GradientMagnitude",
    "Half",
    "HalfPlan",
    "HalfReset",
    "Magnitude",
    "Movement",
    "PrincipalWeights",
    "Proposal",
    "Random",
    "Scores",
    "Selection",
    "half_reset_",
    "topk_csr",
]
