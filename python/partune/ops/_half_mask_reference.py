"""Family half_mask in plain torch: the oracle of the tests, and the kernel of other devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partune.ops._sparse_adamw_reference import reference_sparse_adamw_
from partune.ops.csr import csr_from_flat
from partune.ops.philox import philox

TILE = 1024  # entries between two ranks
COUNTER = 128  # entries whose mask bits one Philox counter draws


def mask_words(count: int) -> int:
    """The words of a packed mask, whole counters."""
    return -(-count // COUNTER) * (COUNTER // 32)


def unpack_mask(mask: Tensor, count: int) -> Tensor:
    """The bool mask [count] of packed words."""
    shifts = torch.arange(32, dtype=torch.int32, device=mask.device)
    return ((mask.unsqueeze(1) >> shifts) & 1).flatten()[:count].to(torch.bool)


def reference_random_mask(count: int, *, mask_seed: Tensor, mask_id: int) -> Tensor:
    counters = torch.arange(-(-count // COUNTER), device=mask_seed.device)
    words = philox(counters, step=0, parameter_id=mask_id, seed=int(mask_seed))
    packed = torch.stack(words, dim=1).flatten()
    left = count - 32 * torch.arange(packed.numel(), device=packed.device)
    packed = packed & ((1 << left.clamp(0, 32)) - 1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def reference_mask_counts(mask: Tensor, count: int) -> Tensor:
    live = unpack_mask(mask, count)
    tiles = -(-count // TILE)
    padded = live.new_zeros(tiles * TILE)
    padded[:count] = live
    return padded.view(tiles, TILE).sum(1)


def matrix_shape(level: str, shape: Sequence[int], state_shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the matrix that a parameter is seen as."""
    numel = 1
    for size in shape:
        numel *= size
    if numel == 0:
        return 0, 0
    if level == "rows":
        return numel // state_shape[1], state_shape[1]
    if level == "columns":
        return state_shape[0], numel // state_shape[0]
    rows = shape[0] if len(shape) == 2 else 1
    return rows, numel // rows


def live_positions(
    level: str, rows: int, columns: int, live: Tensor, mask_seed: Tensor | None, mask_id: int
) -> Tensor:
    """row·columns + column of the live entries, in the order of their state."""
    if level == "rows":
        start = live.to(torch.int64).unsqueeze(1) * columns
        return (start + torch.arange(columns, device=live.device)).flatten()
    if level == "columns":
        start = torch.arange(rows, device=live.device).unsqueeze(1) * columns
        return (start + live).flatten()
    count = rows * columns
    if live.numel() == 0 and count > 0:
        assert mask_seed is not None
        live = reference_random_mask(count, mask_seed=mask_seed, mask_id=mask_id)
    return unpack_mask(live, count).nonzero().flatten()


def reference_half_adamw_(
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
    mask_seed: Tensor | None = None,
    lr: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    eps_mode: str,
    maximize: bool,
    rounding: str,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """The live entries as a CSR, and the reference of family sparse_adamw on it."""
    for i, (weight, grad) in enumerate(zip(self, grads, strict=True)):
        rows, columns = matrix_shape(level, weight.shape, exp_avgs[i].shape)
        if rows == 0:
            continue
        flat = live_positions(level, rows, columns, live[i], mask_seed, mask_ids[i])
        crow_indices, col_indices = csr_from_flat(flat, rows, columns)
        reference_sparse_adamw_(
            [weight.view(rows, columns) if weight.dim() != 2 else weight],
            [grad.view(rows, columns) if grad.dim() != 2 else grad],
            [crow_indices],
            [col_indices],
            [exp_avgs[i].view(-1)],
            [exp_avg_sqs[i].view(-1)],
            [masters[i].view(-1)] if masters else [],
            [state_steps[i]],
            [parameter_ids[i]],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            eps_mode=eps_mode,
            maximize=maximize,
            rounding=rounding,
            seed=seed,
            offset=offset,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
