"""Family block_lora as autograd sees it: a frozen product and its adapter's part are one node.

The adapter's part is added into the frozen product's result, forward and backward, so that nothing
of tokens times features lives beside it; of that size the input alone is saved (of an input that is
a product its factors, where autograd keeps them anyway).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partune.ops._autocast import without_autocast
from partune.ops._contract import OPS, below_autograd
from partune.ops._saved_input import input_of, saved_of
from partune.ops.frozen_linear import in_shape_of, product, rows_of


def _rows(value: Tensor) -> Tensor:
    """[tokens, features], contiguous."""
    return rows_of(value).contiguous()


def _refuse_second_derivative(grads: tuple[Tensor, ...]) -> None:
    if torch.is_grad_enabled() and any(grad.requires_grad for grad in grads):
        raise RuntimeError(
            "block_lora has no second derivative; call backward without create_graph=True"
        )


def _backward(
    ctx: Any,
    grads: list[Tensor],
    grad_input: Tensor | None,
    accumulate: bool,
    saved: tuple[Any, ...],
    trained: tuple[bool, bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of downs and ups; the input's is written or added to in place."""
    first, second, hidden, seed, step, *adapters = saved
    downs, ups = list(adapters[: len(grads)]), list(adapters[len(grads) :])
    grad_downs = [torch.empty_like(down) for down in downs] if trained[0] else []
    grad_ups = [torch.empty_like(up) for up in ups] if trained[1] else []
    if grad_input is not None or trained[0] or trained[1]:
        OPS["block_lora_backward_"].overload(
            grad_input, grad_downs, grad_ups,
            grads, _rows(input_of(first, second)), hidden, downs, ups,
            seed=seed, step=step, accumulate=accumulate, **ctx.options,
        )  # fmt: skip
    nothing: list[Tensor | None] = [None] * len(grads)
    return [*grad_downs] or nothing, [*grad_ups] or nothing


class BlockLoRALinear(torch.autograd.Function):
    """The frozen linears of a group with their adapters.

    Its tensors are weights, biases, downs and ups, as many of each as there are scales.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        seed: Tensor | None,
        step: Tensor | None,
        scales: tuple[float, ...],
        share: str,
        dropout: float,
        layer_id: int,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        count = len(scales)
        weights, biases = tensors[:count], tensors[count : 2 * count]
        downs, ups = tensors[2 * count : 3 * count], tensors[3 * count :]
        ctx.options = {"scales": scales, "share": share, "dropout": dropout, "layer_id": layer_id}
        with below_autograd():
            rows = _rows(input)
            outputs = [
                product(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True)
            ]
            hidden = OPS["block_lora_"].overload(
                outputs, rows, list(downs), list(ups), seed=seed, step=step, **ctx.options
            )
        kept = weights if ctx.needs_input_grad[0] else [None] * count
        ctx.save_for_backward(*saved_of(input), hidden, seed, step, *downs, *ups, *kept)
        return tuple(in_shape_of(input, output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative(grads)
        count = len(grads)
        saved = ctx.saved_tensors
        weights = saved[-count:]
        needed = ctx.needs_input_grad
        needs_down = any(needed[7 + 2 * count : 7 + 3 * count])
        needs_up = any(needed[7 + 3 * count :])
        with below_autograd(), without_autocast(grads[0]):
            rows = [_rows(grad) for grad in grads]
            grad_input = None
            if needed[0]:
                for grad, weight in zip(rows, weights, strict=True):
                    grad_input = product(grad, weight.t(), onto=grad_input)
            grad_downs, grad_ups = _backward(
                ctx, rows, grad_input, True, saved[:-count], (needs_down, needs_up)
            )
            grad_biases = [
                grad.sum(0) if needs_bias else None
                for grad, needs_bias in zip(rows, needed[7 + count : 7 + 2 * count], strict=True)
            ]
        return (
            None if grad_input is None else in_shape_of(saved[0], grad_input),
            None, None, None, None, None, None,
            *[None] * count, *grad_biases, *grad_downs, *grad_ups,
        )  # fmt: skip


class BlockLoRA(torch.autograd.Function):
    """Adapters on results that others computed.

    Its tensors are bases, downs and ups, as many of each as there are scales.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        seed: Tensor | None,
        step: Tensor | None,
        scales: tuple[float, ...],
        share: str,
        dropout: float,
        layer_id: int,
        inplace: bool,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        count = len(scales)
        bases, downs, ups = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        outputs = list(bases)
        if inplace:
            ctx.mark_dirty(*bases)
        else:
            outputs = [base.clone(memory_format=torch.contiguous_format) for base in bases]
        ctx.options = {"scales": scales, "share": share, "dropout": dropout, "layer_id": layer_id}
        rows = [_rows(output) for output in outputs]
        hidden = OPS["block_lora_"].overload(
            rows, _rows(input), list(downs), list(ups), seed=seed, step=step, **ctx.options
        )
        ctx.save_for_backward(*saved_of(input), hidden, seed, step, *downs, *ups)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative(grads)
        count = len(grads)
        saved = ctx.saved_tensors
        needs_down = any(ctx.needs_input_grad[8 + count : 8 + 2 * count])
        needs_up = any(ctx.needs_input_grad[8 + 2 * count :])
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = torch.empty_like(saved[0], memory_format=torch.contiguous_format)
        grad_rows = None if grad_input is None else _rows(grad_input)
        with below_autograd():
            grad_downs, grad_ups = _backward(
                ctx, [_rows(g) for g in grads], grad_rows, False, saved, (needs_down, needs_up)
            )
        return (
            grad_input, None, None, None, None, None, None, None,
            *grads, *grad_downs, *grad_ups,
        )  # fmt: skip
