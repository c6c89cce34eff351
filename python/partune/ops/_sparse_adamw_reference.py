"""Family sparse_adamw in plain torch: the oracle of the tests, and the kernel of other devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partune.ops.csr import flat_indices
from partune.ops.philox import philox
from partune.ops.rounding import round_stochastic


@dataclass(frozen=True)
class _Entries:
    """The stepped entries of one parameter: `flat` counts row·columns + column, None means all."""

    flat: Tensor | None
    rows: int
    columns: int

    @classmethod
    def of(cls, value: Tensor, crow_indices: Tensor, col_indices: Tensor) -> _Entries:
        if crow_indices.numel() == 0:
            return cls(None, 1, value.numel())
        rows = crow_indices.numel() - 1
        columns = value.numel() // max(rows, 1)
        return cls(flat_indices(crow_indices, col_indices, columns), rows, columns)

    def index(self, device: torch.device) -> Tensor:
        """The low words of the random counter: the global position of every entry."""
        return torch.arange(self.columns, device=device) if self.flat is None else self.flat

    def read(self, value: Tensor) -> Tensor:
        if self.flat is None:
            return _in_storage_order(value)
        return self._matrix(value)[self.flat // self.columns, self.flat % self.columns]

    def write(self, value: Tensor, entries: Tensor) -> None:
        if self.flat is None:
            _in_storage_order(value).copy_(entries)
        else:
            self._matrix(value)[self.flat // self.columns, self.flat % self.columns] = entries

    def _matrix(self, value: Tensor) -> Tensor:
        return value if value.dim() == 2 else value.view(self.rows, self.columns)


def _in_storage_order(value: Tensor) -> Tensor:
    return value.as_strided((value.numel(),), (1,), value.storage_offset())


def _store(value: Tensor, dtype: torch.dtype, random: Tensor | None) -> Tensor:
    if random is None or dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    return round_stochastic(value, dtype, random)


def reference_sparse_adamw_(
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
    eps_mode: str,
    maximize: bool,
    rounding: str,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    if found_inf is not None and found_inf.item() != 0:
        return
    grad_factor = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else grad_scale.item())
    rate = lr.item()
    for i, weight in enumerate(self):
        compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
        entries = _Entries.of(weight, crow_indices[i], col_indices[i])
        compact = crow_indices[i].numel() > 0 and grads[i].dim() == 1
        grad = (grads[i] if compact else entries.read(grads[i])).to(compute) * grad_factor
        flat_moments = [_in_storage_order(moment) for moment in (exp_avgs[i], exp_avg_sqs[i])]
        m, v = (moment.to(compute) for moment in flat_moments)
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad * grad
        step = int(state_steps[i].item())
        correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
        if eps_mode == "corrected":
            update = rate / correction1 * (m / (v.sqrt() / correction2 + eps))
        else:
            update = rate * correction2 / correction1 * (m / (v.sqrt() + eps))
        master = _in_storage_order(masters[i]) if masters else None
        old = entries.read(weight).to(compute) if master is None else master
        new = old * (1 - rate * weight_decay) - update

        words: Sequence[Tensor | None] = (None, None, None)
        if seed is not None:
            words = philox(
                entries.index(weight.device),
                step=step + (0 if offset is None else int(offset.item())),
                parameter_id=parameter_ids[i],
                seed=int(seed.item()),
            )
        for moment, values, random in zip(flat_moments, (m, v), words[1:3], strict=True):
            moment.copy_(_store(values, moment.dtype, random))
        if master is not None:
            master.copy_(new)
        stochastic = rounding == "stochastic" and master is None
        entries.write(weight, _store(new, weight.dtype, words[0] if stochastic else None))


def reference_found_inf_(
    found_inf: Tensor,
    grads: Sequence[Tensor],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
) -> None:
    for grad, crow, col in zip(grads, crow_indices, col_indices, strict=True):
        compact = crow.numel() > 0 and grad.dim() == 1
        values = grad if compact else _Entries.of(grad, crow, col).read(grad)
        found_inf.masked_fill_(~values.isfinite().all(), 1.0)


def reference_remap_(
    new_values: Sequence[Tensor],
    old_values: Sequence[Tensor],
    old_crow_indices: Tensor,
    old_col_indices: Tensor,
    new_crow_indices: Tensor,
    new_col_indices: Tensor,
) -> Tensor:
    columns = 1 + max((int(col.max()) for col in (old_col_indices, new_col_indices) if len(col)),
                      default=0)  # fmt: skip
    old = flat_indices(old_crow_indices, old_col_indices, columns)
    new = flat_indices(new_crow_indices, new_col_indices, columns)
    in_both = torch.isin(new, old, assume_unique=True)
    position = torch.searchsorted(old, new[in_both])
    for target, source in zip(new_values, old_values, strict=True):
        target[in_both] = source[position]
    return in_both.sum()
