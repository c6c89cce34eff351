"""Family half_mask: AdamW on half of each matrix, as in HFT (arXiv 2404.18466).

What is live are whole rows, whole columns, or single entries: by a mask that each step draws from
(seed, id, position) and stores nowhere, or by one stored as a bit per entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partune.ops._contract import Op, call, register
from partune.ops._half_mask_checks import (
    check_half_adamw_,
    check_mask_counts,
    check_random_mask,
)
from partune.ops._half_mask_reference import (
    TILE,
    mask_words,
    reference_half_adamw_,
    reference_mask_counts,
    reference_random_mask,
)


def half_adamw_(
    self: Sequence[Tensor],
    grads: Sequence[Tensor],
    live: Sequence[Tensor],
    ranks: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    parameter_ids: Sequence[int],
    mask_ids: Sequence[int],
    *,
    level: str,
    lr: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    eps_mode: str = "corrected",
    maximize: bool = False,
    rounding: str = "nearest",
    mask_seed: Tensor | None = None,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Step the live entries of a list of parameters in place; frozen ones keep their bits.

    The arithmetic is `sparse_adamw_`'s. State exists for live entries only, in row-major order.

    Args:
        self: parameters of one dtype, 2-D with any strides or n-D contiguous. With rows they are
            seen as [numel / columns, columns], with columns as [rows, numel / rows]: the moments'
            shape tells the size that is kept.
        grads: of the parameter's shape (2-D: any strides, else contiguous); of the parameter's
            dtype, or float32 beside 16-bit parameters.
        live: int32. level "rows", "columns": the live ones, ascending. "elements": a packed mask,
            entry i at bit i mod 32 of word i // 32, in whole groups of four words; or empty: drawn
            from mask_seed and mask_ids as `random_mask` draws it.
        ranks: "elements": int64, how many live entries come before every 1024th, and all of them at
            the end; see `mask_ranks`. Else empty.
        exp_avgs, exp_avg_sqs: [live rows, columns], [rows, live columns] or [live elements];
            float32 (float64 beside float64 parameters) or bfloat16.
        masters: none, or float32 of the moments' shape, of which 16-bit parameters are the nearest
            rounding.
        mask_ids: which draw is whose; 0 <= id < 2**32.
        level: "rows", "columns" or "elements".
        mask_seed: 0-d int64, for masks that are drawn.
        state_steps, parameter_ids, lr, beta1, beta2, weight_decay, eps, eps_mode, maximize,
            rounding, seed, offset, grad_scale, found_inf: as for `sparse_adamw_`.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong length, shape, stride, device or value.

    Example:
        >>> W, g, m, v = torch.ones(2, 2), torch.ones(2, 2), torch.zeros(1, 2), torch.zeros(1, 2)
        >>> row, nothing = torch.tensor([1], dtype=torch.int32), torch.empty(0, dtype=torch.int64)
        >>> half_adamw_([W], [g], [row], [nothing], [m], [v], [], [torch.tensor(1.0)], [0], [0],
        ...     level="rows", lr=torch.tensor(0.5), beta1=0.9, beta2=0.95, weight_decay=0.0,
        ...     eps=0.0)
        >>> W
        tensor([[1.0000, 1.0000],
                [0.5000, 0.5000]])
    """
    call(
        "half_adamw_", self, grads, live, ranks, exp_avgs, exp_avg_sqs, masters, state_steps,
        parameter_ids, mask_ids, level=level, lr=lr, beta1=beta1, beta2=beta2,
        weight_decay=weight_decay, eps=eps, eps_mode=eps_mode, maximize=maximize,
        rounding=rounding, mask_seed=mask_seed, seed=seed, offset=offset, grad_scale=grad_scale,
        found_inf=found_inf,
    )  # fmt: skip


def random_mask(count: int, *, mask_seed: Tensor, mask_id: int) -> Tensor:
    """Draw a packed mask in which every entry is live with probability 1/2.

    Entry i is bit i mod 128 of Philox4x32-10's counter (i // 128, step 0, mask_id) under the key
    mask_seed, the same on every device.

    Args:
        count: the number of entries.
        mask_seed: 0-d int64, on the device of the result.
        mask_id: 0 <= id < 2**32.

    Returns:
        int32 words, four for each started 128 entries; bits beyond the last entry are 0.

    Raises:
        TypeError: a seed of another dtype.
        ValueError: a seed that isn't 0-d, a negative count, an id out of range.

    Example:
        >>> random_mask(200, mask_seed=torch.tensor(0), mask_id=1).shape
        torch.Size([8])
    """
    return call("random_mask", count, mask_seed=mask_seed, mask_id=mask_id)  # type: ignore[no-any-return]


def mask_counts(mask: Tensor, count: int) -> Tensor:
    """Count the live entries of each tile of 1024.

    Args:
        mask: int32 words of a packed mask of `count` entries.

    Returns:
        int64 [tiles].

    Raises:
        TypeError: words of another dtype.
        ValueError: a negative count, or a mask of another length.

    Example:
        >>> mask_counts(torch.tensor([7, 0, 0, 0], dtype=torch.int32), 2)
        tensor([2])
    """
    return call("mask_counts", mask, count)  # type: ignore[no-any-return]


def mask_ranks(mask: Tensor, count: int) -> Tensor:
    """Count the live entries before each tile of a packed mask, and at the end all of them.

    Args:
        mask, count: as for `mask_counts`.

    Returns:
        int64 [tiles + 1].

    Raises:
        TypeError, ValueError: as `mask_counts` does.

    Example:
        >>> mask_ranks(torch.tensor([0b101, 0, 0, 0], dtype=torch.int32), 3)
        tensor([0, 2])
    """
    counts = mask_counts(mask, count)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _fake_nothing(*args: object, **kwargs: object) -> None:
    """A kernel that only writes into its arguments."""


def fake_random_mask(count: int, *, mask_seed: Tensor, mask_id: int) -> Tensor:
    return mask_seed.new_empty((mask_words(count),), dtype=torch.int32)


def fake_mask_counts(mask: Tensor, count: int) -> Tensor:
    return mask.new_empty((-(-count // TILE),), dtype=torch.int64)


for _function, _check, _fake, _reference in (
    (half_adamw_, check_half_adamw_, _fake_nothing, reference_half_adamw_),
    (random_mask, check_random_mask, fake_random_mask, reference_random_mask),
    (mask_counts, check_mask_counts, fake_mask_counts, reference_mask_counts),
):
    register(Op(_function.__name__, "half_mask", _function, _check, _fake, _reference))
