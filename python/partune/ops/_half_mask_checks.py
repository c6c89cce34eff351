"""Family half_mask: the checks that its wrappers and its fake kernels share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from partune.ops import _checks as check
from partune.ops._half_mask_reference import TILE, mask_words, matrix_shape
from partune.ops._sparse_adamw_checks import check_state_dtypes, check_step

LEVELS = ("rows", "columns", "elements")


def check_half_adamw_(
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
    eps_mode: str,
    maximize: bool,
    rounding: str,
    mask_seed: Tensor | None = None,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    check.one_of("level", level, LEVELS)
    lists = {
        "grads": grads, "live": live, "ranks": ranks, "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs, "state_steps": state_steps,
    }  # fmt: skip
    device = check_step(
        self, lists, masters, parameter_ids, lr, (beta1, beta2), weight_decay, eps, eps_mode,
        rounding, seed, offset, grad_scale, found_inf,
    )  # fmt: skip
    check.length("mask_ids", mask_ids, len(self))
    if mask_seed is not None:
        check.scalar("mask_seed", mask_seed, (torch.int64,), device)
    for i, weight in enumerate(self):
        check.dtype("self", weight, check.FLOATING, i)
        check.same_dtype("self", weight, self[0].dtype, i)
        check.same_dtype("grads", grads[i], grads[0].dtype, i)
        check.grad_dtype(grads[i], weight, i)
        check.shape("grads", grads[i], weight.shape, i)
        for name, value in (("self", weight), ("grads", grads[i])):
            if value.dim() != 2:
                check.contiguous(name, value, i)
        check.parameter_id("mask_ids", mask_ids[i], i)
        _check_live(level, i, weight, live[i], ranks[i], exp_avgs[i], mask_seed)
        for name, moments in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
            check.same_dtype(name, moments[i], exp_avgs[0].dtype, i)
            check.shape(name, moments[i], exp_avgs[i].shape, i)
            check.contiguous(name, moments[i], i)
        if masters:
            check.shape("masters", masters[i], exp_avgs[i].shape, i)
            check.contiguous("masters", masters[i], i)
        check.scalar("state_steps", state_steps[i], (torch.float32,), device, i)
        check.parameter_id("parameter_ids", parameter_ids[i], i)
    if self:
        check_state_dtypes(self[0], exp_avgs[0], masters, rounding, seed)


def _check_live(
    level: str,
    i: int,
    weight: Tensor,
    live: Tensor,
    ranks: Tensor,
    exp_avg: Tensor,
    mask_seed: Tensor | None,
) -> None:
    """What tells the live entries, and the state's shape that follows from it."""
    check.indices("live", live, torch.int32, i)
    check.indices("ranks", ranks, torch.int64, i)
    if level != "elements":
        if exp_avg.dim() != 2:
            raise ValueError(
                f"exp_avgs[{i}]: got shape {tuple(exp_avg.shape)}, want a matrix for {level}"
            )
        kept = exp_avg.shape[1] if level == "rows" else exp_avg.shape[0]
        if weight.numel() > 0 and (kept == 0 or weight.numel() % kept):
            raise ValueError(
                f"exp_avgs[{i}]: got shape {tuple(exp_avg.shape)}, which doesn't fit a parameter "
                f"of shape {tuple(weight.shape)}"
            )
        rows, columns = matrix_shape(level, weight.shape, exp_avg.shape)
        if weight.dim() == 2 and weight.numel() > 0 and rows != weight.shape[0]:
            raise ValueError(
                f"exp_avgs[{i}]: got shape {tuple(exp_avg.shape)}, want the rows or columns of a "
                f"parameter of shape {tuple(weight.shape)}"
            )
        wanted = (live.numel(), kept) if level == "rows" else (kept, live.numel())
        check.shape("exp_avgs", exp_avg, wanted, i)
        if live.numel() > (rows if level == "rows" else columns):
            raise ValueError(f"live[{i}]: got {live.numel()} {level}, more than there are")
        return
    count = math.prod(weight.shape)
    if live.numel() == 0 and count > 0:
        if mask_seed is None:
            raise ValueError(
                f"mask_seed: got None, want a 0-d int64 tensor, as live[{i}] is no stored mask"
            )
    else:
        check.shape("live", live, (mask_words(count),), i)
    check.shape("ranks", ranks, (-(-count // TILE) + 1,), i)
    if exp_avg.dim() != 1 or exp_avg.numel() > count:
        raise ValueError(
            f"exp_avgs[{i}]: got shape {tuple(exp_avg.shape)}, want a vector of at most {count}"
        )


def check_random_mask(count: int, *, mask_seed: Tensor, mask_id: int) -> None:
    _check_count(count)
    check.scalar("mask_seed", mask_seed, (torch.int64,), None)
    check.parameter_id("mask_id", mask_id)


def check_mask_counts(mask: Tensor, count: int) -> None:
    check.tensor("mask", mask, None)
    _check_count(count)
    check.indices("mask", mask, torch.int32)
    check.shape("mask", mask, (mask_words(count),))


def _check_count(count: int) -> None:
    if count < 0:
        raise ValueError(f"count: got {count}, want at least 0")
