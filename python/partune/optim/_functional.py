"""The maths of a step, on lists of tensors: which op is called with what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from partune import ops
from partune.ops._contract import OPS
from partune.selection.half.live import LiveHalf

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StepOptions(TypedDict):
    """The numbers of a step, alike for all of its parameters."""

    lr: float | Tensor
    betas: tuple[float, float]
    weight_decay: float
    eps: float
    eps_mode: str
    maximize: bool
    seed: int
    grad_scale: Tensor | None
    found_inf: Tensor | None
    again: bool  # the same call as before but for the gradients, which are alike: not checked again


def sparse_adamw(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    state_steps: list[Tensor],
    parameter_ids: Sequence[int],
    **options: Unpack[StepOptions],
) -> None:
    """Count the steps up and update the selected entries of parameters alike in dtype and device.

    16-bit parameters without masters and bfloat16 moments are rounded stochastically. Where
    found_inf isn't 0 the step is neither counted nor taken; nobody waits to learn which.
    """
    step = OPS["sparse_adamw_"].overload if options["again"] else ops.sparse_adamw_
    step(
        parameters,
        grads,
        crow_indices,
        col_indices,
        exp_avgs,
        exp_avg_sqs,
        masters,
        state_steps,
        parameter_ids,
        **_begin_step(parameters[0], exp_avgs[0], masters, state_steps, options),
    )


def half_adamw(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    halves: Sequence[LiveHalf],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    state_steps: list[Tensor],
    parameter_ids: Sequence[int],
    **options: Unpack[StepOptions],
) -> None:
    """The same for parameters of which rows, columns or elements are live, all of one level."""
    step = OPS["half_adamw_"].overload if options["again"] else ops.half_adamw_
    step(
        parameters,
        grads,
        [half.live for half in halves],
        [half.ranks for half in halves],
        exp_avgs,
        exp_avg_sqs,
        masters,
        state_steps,
        parameter_ids,
        [half.mask_id for half in halves],
        level=halves[0].level,
        mask_seed=halves[0].mask_seed,
        **_begin_step(parameters[0], exp_avgs[0], masters, state_steps, options),
    )


def _begin_step(
    parameter: Tensor,
    exp_avg: Tensor,
    masters: Sequence[Tensor],
    state_steps: list[Tensor],
    options: StepOptions,
) -> dict[str, Any]:
    """Count the steps up; the options as the ops take them."""
    device, found_inf = parameter.device, options["found_inf"]
    torch._foreach_add_(state_steps, torch.ones((), dtype=torch.float32), alpha=1.0)
    if found_inf is not None:
        found_inf = found_inf.reshape(()).to(device)
        torch._foreach_sub_(state_steps, [found_inf] * len(state_steps))
    stochastic = parameter.dtype in (torch.bfloat16, torch.float16) and not masters
    draws = stochastic or exp_avg.dtype == torch.bfloat16
    grad_scale = options["grad_scale"]
    return {
        "lr": learning_rate(options["lr"], device),
        "beta1": options["betas"][0],
        "beta2": options["betas"][1],
        "weight_decay": options["weight_decay"],
        "eps": options["eps"],
        "eps_mode": options["eps_mode"],
        "maximize": options["maximize"],
        "rounding": "stochastic" if stochastic else "nearest",
        "seed": torch.full((), options["seed"], dtype=torch.int64, device=device)
        if draws
        else None,
        "grad_scale": None if grad_scale is None else grad_scale.reshape(()).to(device),
        "found_inf": found_inf,
    }


def learning_rate(lr: float | Tensor, device: torch.device) -> Tensor:
    """The rate as the op takes it: on the CPU, or in float32 on the parameters' device."""
    if not isinstance(lr, Tensor):
        return torch.tensor(lr, dtype=torch.float64)
    lr = lr.detach().reshape(())
    if lr.device.type == "cpu":
        return lr if lr.dtype in (torch.float32, torch.float64) else lr.to(torch.float64)
    return lr.to(device=device, dtype=torch.float32)


def update_norm(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    eps_mode: str,
) -> float:
    """The 2-norm of an update without its decay, from the moments that it left."""
    if step == 0:
        return 0.0
    correction1, correction2 = (float(1 - beta**step) for beta in betas)
    denominator = exp_avg_sq.to(torch.float64).sqrt()
    if eps_mode == "corrected":
        denominator = denominator / math.sqrt(correction2)
        step_size = lr / correction1
    else:
        step_size = lr * math.sqrt(correction2) / correction1
    norm: Tensor = torch.linalg.vector_norm(exp_avg.to(torch.float64) / (denominator + eps))
    return step_size * float(norm)
