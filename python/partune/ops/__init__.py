"""The core's ops in Python: signatures, checks, fake kernels and plain-torch references."""

from partune.ops.half_mask import half_adamw_, mask_counts, mask_ranks, random_mask
from partune.ops.select import random_scores, threshold_csr, topk_csr, topk_csr_factors
from partune.ops.sparse_adamw import found_inf_, remap_, sparse_adamw_

__all__ = [
    "found_inf_",
    "half_adamw_",
    "mask_counts",
    "mask_ranks",
    "random_mask",
    "random_scores",
    "remap_",
    "sparse_adamw_",
    "threshold_csr",
    "topk_csr",
    "topk_csr_factors",
]
