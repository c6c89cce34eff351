"""Family sparse_adamw: AdamW on the selected entries of a list of matrices.

Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101 (decoupled decay); selected
entries as in LIFT, arXiv 2506.00772.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partune.ops._contract import Op, call, register
from partune.ops._sparse_adamw_checks import (
    check_found_inf_,
    check_remap_,
    check_sparse_adamw_,
)
from partune.ops._sparse_adamw_reference import (
    reference_found_inf_,
    reference_remap_,
    reference_sparse_adamw_,
)


def sparse_adamw_(
    self: Sequence[Tensor],
    grads: Sequence[Tensor],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    parameter_ids: Sequence[int],
    *,
    lr: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    eps_mode: str = "corrected",
    maximize: bool = False,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Step the selected entries of a list of parameters in place; gradients are only read.

    With g = grad / grad_scale (negated by `maximize`): W is multiplied by 1 - lr·weight_decay, then
    loses lr/(1-β1^t) · m/(√v/√(1-β2^t) + eps) ("corrected": torch, Algorithm 1 of the paper) or
    lr·√(1-β2^t)/(1-β1^t) · m/(√v + eps) ("uncorrected": LIFT's released code).

    Args:
        self: parameters of one dtype, [rows, columns] with any strides or n-D contiguous, seen as
            [rows, numel / rows] with rows from the CSR.
        grads: of the parameter's shape (2-D: any strides, else contiguous) or, with a CSR, [nnz];
            of the parameter's dtype, or float32 beside 16-bit parameters.
        crow_indices, col_indices: int64 [rows + 1] and int32 [nnz], ascending and row-major. Both
            empty: a dense parameter, whose gradient and moments have its shape and strides.
        exp_avgs, exp_avg_sqs: [nnz], float32 (float64 beside float64 parameters) or bfloat16, which
            is stored with stochastic rounding.
        masters: none, or float32 [nnz] each, of which 16-bit parameters are the nearest rounding.
        state_steps: 0-d float32, the number of this update, from 1.
        parameter_ids: the fourth word of the random counter.
        lr: 0-d, on the CPU (float32 or float64) or on the parameters' device (float32).
        rounding: "nearest" or "stochastic", of 16-bit parameters without a master.
        seed, offset: 0-d int64; the random counter's step is state_step + offset.
        grad_scale, found_inf: 0-d float32; where found_inf is not 0, nothing is written.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong length, shape, stride, device or value.

    Example:
        >>> W, g, m, v = torch.ones(2, 2), torch.ones(2, 2), torch.zeros(1), torch.zeros(1)
        >>> crow, col = torch.tensor([0, 1, 1]), torch.tensor([1], dtype=torch.int32)
        >>> sparse_adamw_([W], [g], [crow], [col], [m], [v], [], [torch.tensor(1.0)], [0],
        ...     lr=torch.tensor(0.5), beta1=0.9, beta2=0.95, weight_decay=0.0, eps=0.0)
        >>> W
        tensor([[1.0000, 0.5000],
                [1.0000, 1.0000]])
    """
    call(
        "sparse_adamw_", self, grads, crow_indices, col_indices, exp_avgs, exp_avg_sqs, masters,
        state_steps, parameter_ids, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay,
        eps=eps, eps_mode=eps_mode, maximize=maximize, rounding=rounding, seed=seed, offset=offset,
        grad_scale=grad_scale, found_inf=found_inf,
    )  # fmt: skip


def found_inf_(
    found_inf: Tensor,
    grads: Sequence[Tensor],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
) -> None:
    """Set a flag to 1 where any selected gradient entry is NaN or infinite; else leave it.

    Args:
        found_inf: 0-d float32.
        grads, crow_indices, col_indices: as for `sparse_adamw_`.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong length, shape or device.

    Example:
        >>> flag, g = torch.tensor(0.0), torch.tensor([[1.0, float("nan")]])
        >>> found_inf_(flag, [g], [torch.tensor([0, 1])], [torch.tensor([0], dtype=torch.int32)])
        >>> flag
        tensor(0.)
    """
    call("found_inf_", found_inf, grads, crow_indices, col_indices)


def remap_(
    new_values: Sequence[Tensor],
    old_values: Sequence[Tensor],
    old_crow_indices: Tensor,
    old_col_indices: Tensor,
    new_crow_indices: Tensor,
    new_col_indices: Tensor,
) -> Tensor:
    """Carry the values of one matrix from an old CSR to a new one, where both hold the entry.

    Args:
        new_values: [new nnz] each; other entries are left as they are.
        old_values: [old nnz] each, with the dtype of its new_values.
        old_crow_indices, old_col_indices: int64 [rows + 1] and int32 [old nnz].
        new_crow_indices, new_col_indices: int64 [rows + 1] and int32 [new nnz].

    Returns:
        The number of entries in both, 0-d int64.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong length, shape or device.

    Example:
        >>> new, old, row = torch.zeros(2), torch.tensor([5.0, 7.0]), torch.tensor([0, 2])
        >>> columns = torch.tensor([[0, 2], [2, 3]], dtype=torch.int32)
        >>> remap_([new], [old], row, columns[0], row, columns[1]), new
        (tensor(1), tensor([7., 0.]))
    """
    return call(  # type: ignore[no-any-return]
        "remap_", new_values, old_values, old_crow_indices, old_col_indices, new_crow_indices,
        new_col_indices,
    )  # fmt: skip


def _fake_nothing(*args: object, **kwargs: object) -> None:
    """A kernel that only writes into its arguments."""


def fake_remap_(
    new_values: Sequence[Tensor],
    old_values: Sequence[Tensor],
    old_crow_indices: Tensor,
    old_col_indices: Tensor,
    new_crow_indices: Tensor,
    new_col_indices: Tensor,
) -> Tensor:
    return old_crow_indices.new_empty((), dtype=torch.int64)


for _function, _check, _fake, _reference in (
    (sparse_adamw_, check_sparse_adamw_, _fake_nothing, reference_sparse_adamw_),
    (found_inf_, check_found_inf_, _fake_nothing, reference_found_inf_),
    (remap_, check_remap_, fake_remap_, reference_remap_),
):
    register(Op(_function.__name__, "sparse_adamw", _function, _check, _fake, _reference))
