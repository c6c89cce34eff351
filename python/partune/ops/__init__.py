"""The core's ops in Python: signatures, checks, fake kernels and plain-torch references."""

from partune.ops._scale_shift_autograd import kept_inputs
from partune.ops.block_lora import (
    block_lora,
    block_lora_,
    block_lora_backward_,
    block_lora_linear,
)
from partune.ops.csr_entries import gather_csr, gather_csr_, scatter_csr_
from partune.ops.frozen_linear import frozen_linear
from partune.ops.half_mask import half_adamw_, mask_counts, mask_ranks, random_mask
from partune.ops.sampled_grad import sampled_grad, sampled_grad_
from partune.ops.scale_shift import scale_shift, scale_shift_, scale_shift_backward
from partune.ops.scale_shift_norm import (
    layer_norm_scale_shift,
    layer_norm_scale_shift_backward,
    rms_norm_scale_shift,
    rms_norm_scale_shift_backward,
)
from partune.ops.select import random_scores, threshold_csr, topk_csr, topk_csr_factors
from partune.ops.sparse_adamw import found_inf_, remap_, sparse_adamw_
from partune.ops.sparse_linear import sparse_linear

__all__ = [
    "block_lora",
    "block_lora_",
    "block_lora_backward_",
    "block_lora_linear",
    "found_inf_",
    "frozen_linear",
    "gather_csr",
    "gather_csr_",
    "half_adamw_",
    "kept_inputs",
    "layer_norm_scale_shift",
    "layer_norm_scale_shift_backward",
    "mask_counts",
    "mask_ranks",
    "random_mask",
    "random_scores",
    "remap_",
    "rms_norm_scale_shift",
    "rms_norm_scale_shift_backward",
    "sampled_grad",
    "sampled_grad_",
    "scale_shift",
    "scale_shift_",
    "scale_shift_backward",
    "scatter_csr_",
    "sparse_adamw_",
    "sparse_linear",
    "threshold_csr",
    "topk_csr",
    "topk_csr_factors",
]
