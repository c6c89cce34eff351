"""Family sparse_adamw: the checks that its wrappers and its fake kernels share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partune.ops import _checks as check

EPS_MODES = ("corrected", "uncorrected")
ROUNDINGS = ("nearest", "stochastic")
_FLOAT32 = (torch.float32,)
_INT64 = (torch.int64,)


def check_sparse_adamw_(
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
    lists = {
        "grads": grads, "crow_indices": crow_indices, "col_indices": col_indices,
        "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "state_steps": state_steps,
    }  # fmt: skip
    device = check_step(
        self, lists, masters, parameter_ids, lr, (beta1, beta2), weight_decay, eps, eps_mode,
        rounding, seed, offset, grad_scale, found_inf,
    )  # fmt: skip
    for i, weight in enumerate(self):
        check.dtype("self", weight, check.FLOATING, i)
        check.same_dtype("self", weight, self[0].dtype, i)
        check.same_dtype("grads", grads[i], grads[0].dtype, i)
        _check_grad(i, weight, grads[i], crow_indices[i], col_indices[i])
        shape = weight.shape if crow_indices[i].numel() == 0 else col_indices[i].shape
        for name, moments in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
            check.same_dtype(name, moments[i], exp_avgs[0].dtype, i)
            _check_state(name, i, moments[i], weight, shape)
        if masters:
            _check_state("masters", i, masters[i], weight, shape)
        check.scalar("state_steps", state_steps[i], _FLOAT32, device, i)
        check.parameter_id("parameter_ids", parameter_ids[i], i)
    if self:
        check_state_dtypes(self[0], exp_avgs[0], masters, rounding, seed)


def check_step(
    self: Sequence[Tensor],
    lists: dict[str, Sequence[Tensor]],
    masters: Sequence[Tensor],
    parameter_ids: Sequence[int],
    lr: Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
    eps_mode: str,
    rounding: str,
    seed: Tensor | None,
    offset: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> torch.device | None:
    """What every AdamW step takes: lists of one length on one device, and the numbers of a step."""
    first = self[0] if isinstance(self, list | tuple) and self else None
    check.tensors("self", self, first.device if isinstance(first, Tensor) else None)
    device = self[0].device if self else None
    for name, values in lists.items():
        check.tensors(name, values, device)
        check.length(name, values, len(self))
    check.tensors("masters", masters, device)
    if len(masters) not in (0, len(self)):
        raise ValueError(f"masters: got {len(masters)} entries, want none or {len(self)}")
    check.length("parameter_ids", parameter_ids, len(self))
    if isinstance(lr, Tensor) and lr.device.type == "cpu":  # it travels by value
        check.scalar("lr", lr, (torch.float32, torch.float64), None)
    else:
        check.scalar("lr", lr, _FLOAT32, device)
    _check_hyperparameters(*betas, weight_decay, eps, eps_mode, rounding)
    for name, scalar, dtypes in (
        ("seed", seed, _INT64), ("offset", offset, _INT64),
        ("grad_scale", grad_scale, _FLOAT32), ("found_inf", found_inf, _FLOAT32),
    ):  # fmt: skip
        if scalar is not None:
            check.scalar(name, scalar, dtypes, device)
    return device


def _check_hyperparameters(
    beta1: float, beta2: float, weight_decay: float, eps: float, eps_mode: str, rounding: str
) -> None:
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}: got {beta}, want 0 <= {name} < 1")
    for name, value in (("weight_decay", weight_decay), ("eps", eps)):
        if not value >= 0.0:
            raise ValueError(f"{name}: got {value}, want at least 0")
    check.one_of("eps_mode", eps_mode, EPS_MODES)
    check.one_of("rounding", rounding, ROUNDINGS)


def _check_grad(
    i: int, weight: Tensor, grad: Tensor, crow_indices: Tensor, col_indices: Tensor
) -> None:
    check.grad_dtype(grad, weight, i)
    check.csr(crow_indices, col_indices, i)
    if crow_indices.numel() == 0:
        check.shape("grads", grad, weight.shape, i)
        check.without_gaps("self", weight, i)
        check.strides("grads", grad, weight, i)
        return
    _check_rows("self", i, weight, crow_indices.numel() - 1)
    if col_indices.numel() > weight.numel():
        raise ValueError(
            f"col_indices[{i}]: got {col_indices.numel()} entries, want at most {weight.numel()}"
        )
    if grad.dim() == 1:
        check.shape("grads", grad, col_indices.shape, i)
        check.contiguous("grads", grad, i)
        return
    check.shape("grads", grad, weight.shape, i)
    if grad.dim() != 2:
        check.contiguous("grads", grad, i)


def _check_rows(name: str, i: int, value: Tensor, rows: int) -> None:
    """A parameter or a gradient that the CSR's rows fit."""
    if value.dim() < 2:
        raise ValueError(
            f"{name}[{i}]: got shape {tuple(value.shape)} with a CSR, want at least two dimensions"
        )
    if value.dim() == 2:
        fits = value.shape[0] == rows
    else:
        check.contiguous(name, value, i)
        fits = value.numel() == 0 or (rows > 0 and value.numel() % rows == 0)
    if not fits:
        raise ValueError(
            f"crow_indices[{i}]: got {rows} rows, want those of {name}[{i}] of shape "
            f"{tuple(value.shape)}"
        )


def _check_state(name: str, i: int, value: Tensor, weight: Tensor, shape: Sequence[int]) -> None:
    check.shape(name, value, shape, i)
    if shape == weight.shape:
        check.strides(name, value, weight, i)
    else:
        check.contiguous(name, value, i)


def check_state_dtypes(
    weight: Tensor, moment: Tensor, masters: Sequence[Tensor], rounding: str, seed: Tensor | None
) -> None:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    narrow = () if weight.dtype == torch.float64 else (torch.bfloat16,)
    check.dtype("exp_avgs", moment, (wide, *narrow), 0)
    for i, master in enumerate(masters):
        check.dtype("masters", master, _FLOAT32, i)
    sixteen_bit = weight.dtype in check.SIXTEEN_BIT
    if masters and not sixteen_bit:
        raise TypeError(
            f"masters: got some beside {weight.dtype}, want none but for 16-bit weights"
        )
    rounds_weights = sixteen_bit and rounding == "stochastic" and not masters
    if seed is None and (rounds_weights or moment.dtype == torch.bfloat16):
        raise ValueError("seed: got None, want a 0-d int64 tensor for stochastic rounding")


def check_found_inf_(
    found_inf: Tensor,
    grads: Sequence[Tensor],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
) -> None:
    check.scalar("found_inf", found_inf, _FLOAT32, None)
    check.tensors("grads", grads, found_inf.device)
    for name, values in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        check.tensors(name, values, found_inf.device)
        check.length(name, values, len(grads))
    for i, (grad, crow, col) in enumerate(zip(grads, crow_indices, col_indices, strict=True)):
        check.dtype("grads", grad, check.FLOATING, i)
        check.csr(crow, col, i)
        if crow.numel() == 0:
            check.without_gaps("grads", grad, i)
        elif grad.dim() == 1:
            check.shape("grads", grad, col.shape, i)
            check.contiguous("grads", grad, i)
        else:
            _check_rows("grads", i, grad, crow.numel() - 1)


def check_remap_(
    new_values: Sequence[Tensor],
    old_values: Sequence[Tensor],
    old_crow_indices: Tensor,
    old_col_indices: Tensor,
    new_crow_indices: Tensor,
    new_col_indices: Tensor,
) -> None:
    check.tensor("old_crow_indices", old_crow_indices, None)
    device = old_crow_indices.device
    for name, value, dtype in (
        ("old_crow_indices", old_crow_indices, torch.int64),
        ("old_col_indices", old_col_indices, torch.int32),
        ("new_crow_indices", new_crow_indices, torch.int64),
        ("new_col_indices", new_col_indices, torch.int32),
    ):
        check.tensor(name, value, device)
        check.indices(name, value, dtype)
    check.shape("new_crow_indices", new_crow_indices, old_crow_indices.shape)
    if old_crow_indices.numel() == 0:
        raise ValueError("old_crow_indices: got no entries, want rows + 1")
    check.tensors("new_values", new_values, device)
    check.tensors("old_values", old_values, device)
    check.length("old_values", old_values, len(new_values))
    for i, (new, old) in enumerate(zip(new_values, old_values, strict=True)):
        check.dtype("new_values", new, check.FLOATING, i)
        check.dtype("old_values", old, (new.dtype,), i)
        for name, value, col in (
            ("new_values", new, new_col_indices),
            ("old_values", old, old_col_indices),
        ):
            check.shape(name, value, col.shape, i)
            check.contiguous(name, value, i)
