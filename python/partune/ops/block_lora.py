"""Family block_lora: frozen linears with low-rank adapters, cut into blocks (Block-LoRA)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partune.ops import _block_lora_autograd as autograd
from partune.ops import _block_lora_reference as reference
from partune.ops._autocast import autocast_dtype
from partune.ops._block_lora_checks import (
    check_adapters,
    check_bases,
    check_block_lora_,
    check_block_lora_backward_,
    check_dropout,
    check_linears,
    computing_type,
)
from partune.ops._contract import Op, call, register


def block_lora_linear(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    *,
    scales: Sequence[float],
    share: str = "input",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    layer_id: int = 0,
) -> list[Tensor]:
    """Run frozen linears that read one input, each with its adapter: y = xWᵀ + b + s·(xA)B.

    Block-LoRA, arXiv 2501.16720. One entry of each list per linear: one for a single layer; q, k
    and v, or gate and up, share one reading of the input. With share="input" the input's features
    are cut into n chunks, which are summed before the down-projection: (x_1+…+x_n)·A. With
    share="rank" the rank is cut into n arms, which share the down-projection: xA·(B_1+…+B_n); all
    arms get the same gradient, so that arms that start equal stay equal. n = 1 is plain LoRA.

    Differentiable, once, with respect to input, biases, downs and ups. Of the size of tokens times
    features nothing is saved but the input: dropout's mask is drawn again in the backward. What is
    added to bfloat16 outputs and input gradients may be a product of factors rounded to bfloat16
    (on CPUs with AVX512_BF16); the adapters' gradients never are. Under autocast input, weights
    and biases are cast as torch's linear casts them; adapters are not.

    Args:
        input: float64, float32, bfloat16 or float16, [..., in]. Copied where it isn't contiguous.
        weights: [out_i, in], of the input's dtype; frozen, so they may not require grad.
        biases: [out_i], or None.
        downs: A; [r_i, in/n] with share="input", [r_i/n, in] with share="rank". Adapters are
            float32, or float64 beside a float64 input; others are widened.
        ups: B; [out_i, r_i] with share="input", [n, out_i, r_i/n] with share="rank".
        scales: s, a number per linear.
        share: "input" or "rank".
        dropout: the share of the input's elements that the down-projections don't see, in steps of
            2**-16; the others are scaled up. 0 for evaluation.
        seed, step: 0-d int64 on the input's device: what the mask is drawn from (Philox4x32-10),
            with layer_id and the element's place. They are saved for the backward: don't count in
            place between. Without a seed, one is drawn from torch's generator.
        layer_id: 0 <= id < 2**32, one per input that is dropped from.

    Returns:
        [..., out_i] for each linear, of the input's dtype.

    Raises:
        TypeError: another dtype, or something else than a tensor.
        ValueError: shapes, devices or lengths that do not agree; blocks that do not divide what
            they cut; a weight that requires grad; dropout or layer_id out of range.
        RuntimeError: a second derivative was asked for.

    Example:
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.eye(2)
        >>> down, up = torch.tensor([[1.0]]), torch.tensor([[1.0], [0.0]])  # two blocks
        >>> block_lora_linear(x, [weight], [None], [down], [up], scales=[0.5])
        [tensor([[2.5000, 2.0000]])]
    """
    check_adapters(input, downs, ups, scales, share)
    check_linears(weights, biases, input, ups)
    check_dropout(input.device, dropout, seed, step, layer_id)
    return block_lora_linear_of_layers(
        input, weights, biases, downs, ups,
        scales=scales, share=share, dropout=dropout, seed=seed, step=step, layer_id=layer_id,
    )  # fmt: skip


def block_lora_linear_of_layers(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    *,
    scales: Sequence[float],
    share: str,
    dropout: float,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    layer_id: int = 0,
) -> list[Tensor]:
    """`block_lora_linear` of what layers have checked; the native ops check what they must.

    After a product has emptied the caches, checks in Python take longer than the small products.
    """
    dtype = autocast_dtype(input)
    if dtype is not None:
        input = input.to(dtype)
        weights = [weight.to(dtype) for weight in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    for name, values in (("weights", weights), ("biases", biases)):
        _check_dtypes(name, values, input)
    outputs = autograd.BlockLoRALinear.apply(  # type: ignore[no-untyped-call]
        input, *_draws_from(input, dropout, seed, step), tuple(scales), share, dropout, layer_id,
        *weights, *biases, *_computing(input, downs), *_computing(input, ups),
    )  # fmt: skip
    return list(outputs)


def block_lora(
    input: Tensor,
    bases: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    *,
    scales: Sequence[float],
    share: str = "input",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    layer_id: int = 0,
    inplace: bool = False,
) -> list[Tensor]:
    """Add adapters' parts to what frozen layers made of the same input: y = base + s·(xA)B.

    For layers whose product is not torch's linear: quantised, convolutional or foreign ones.
    Otherwise as `block_lora_linear`, which needs one pass less over the input's gradient.

    Args:
        input: as for `block_lora_linear`; cast to the bases' dtype where that is another.
        bases: [..., out_i], all of one dtype.
        downs, ups, scales, share, dropout, seed, step, layer_id: as for `block_lora_linear`.
        inplace: overwrite the bases, which must be contiguous and no leaves that require grad;
            left as they are under torch.compile and torch.export, and where one is a view, as
            torch's linear returns for more than two dimensions: autograd couldn't follow.

    Returns:
        [..., out_i] for each base, of its dtype; the bases themselves where they are overwritten.

    Raises:
        TypeError: another dtype, or something else than a tensor.
        ValueError: as for `block_lora_linear`, and bases that can't be overwritten.
        RuntimeError: a second derivative was asked for.

    Example:
        >>> x, base = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
        >>> down, up = torch.tensor([[1.0]]), torch.tensor([[1.0], [0.0]])  # two blocks
        >>> block_lora(x, [base], [down], [up], scales=[0.5])
        [tensor([[1.5000, 0.0000]])]
    """
    check_adapters(input, downs, ups, scales, share)
    check_bases(bases, input, ups)
    if inplace:
        _check_inplace(bases)
        inplace = _can_overwrite(bases)
    input = input.to(bases[0].dtype)
    check_dropout(input.device, dropout, seed, step, layer_id)
    outputs = autograd.BlockLoRA.apply(  # type: ignore[no-untyped-call]
        input, *_draws_from(input, dropout, seed, step), tuple(scales), share, dropout, layer_id,
        inplace, *bases, *_computing(input, downs), *_computing(input, ups),
    )  # fmt: skip
    return list(outputs)


def block_lora_(
    outputs: list[Tensor],
    input: Tensor,
    downs: list[Tensor],
    ups: list[Tensor],
    *,
    scales: Sequence[float],
    share: str = "input",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    layer_id: int = 0,
) -> Tensor:
    """Add the adapters' parts to `outputs`; without autograd.

    What `block_lora` and `block_lora_linear` run on, which are differentiable.

    Args:
        outputs: [tokens, out_i], contiguous, of the input's dtype.
        input: float64, float32, bfloat16 or float16, [tokens, in], contiguous.
        downs, ups, scales, share, dropout, layer_id: as for `block_lora_linear`; adapters in
            float32, or float64 beside a float64 input, and contiguous.
        seed, step: needed where dropout is above 0.

    Returns:
        What the down-projections made of the input, side by side: [tokens, ranks of all], of the
        adapters' dtype.

    Raises:
        TypeError: another dtype.
        ValueError: shapes, layouts, devices or lengths that do not agree; blocks that do not divide
            what they cut; dropout without seed and step, or out of range.

    Example:
        >>> output, x = torch.zeros(1, 2), torch.tensor([[1.0, 2.0]])
        >>> down, up = torch.tensor([[1.0]]), torch.tensor([[1.0], [0.0]])  # two blocks
        >>> block_lora_([output], x, [down], [up], scales=[0.5])
        tensor([[3.]])
        >>> output
        tensor([[1.5000, 0.0000]])
    """
    return call(  # type: ignore[no-any-return]
        "block_lora_", outputs, input, downs, ups,
        scales=scales, share=share, dropout=dropout, seed=seed, step=step, layer_id=layer_id,
    )  # fmt: skip


def block_lora_backward_(
    grad_input: Tensor | None,
    grad_downs: list[Tensor],
    grad_ups: list[Tensor],
    grads: list[Tensor],
    input: Tensor,
    hidden: Tensor,
    downs: list[Tensor],
    ups: list[Tensor],
    *,
    scales: Sequence[float],
    share: str = "input",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    layer_id: int = 0,
    accumulate: bool = False,
) -> None:
    """Differentiate `block_lora_`: a pass over each gradient, one over the input and its gradient.

    Args:
        grad_input: [tokens, in], of the input's dtype: the input's gradient, overwritten, or added
            to with accumulate=True; None where it isn't wanted.
        grad_downs, grad_ups: shaped as downs and ups, and overwritten with their gradients; empty
            lists where they aren't wanted.
        grads: [tokens, out_i], the outputs' gradients.
        input, downs, ups, scales, share, dropout, seed, step, layer_id: as given to `block_lora_`.
        hidden: what that returned.
        accumulate: add to `grad_input`.

    Raises:
        TypeError: another dtype.
        ValueError: as for `block_lora_`.

    Example:
        >>> x, down, up = torch.ones(1, 2), torch.tensor([[1.0]]), torch.tensor([[1.0], [0.0]])
        >>> grad_up = torch.empty(2, 1)
        >>> block_lora_backward_(
        ...     None, [], [grad_up], [torch.ones(1, 2)], x, torch.tensor([[2.0]]), [down], [up],
        ...     scales=[0.5],
        ... )
        >>> grad_up
        tensor([[1.],
                [1.]])
    """
    call(
        "block_lora_backward_", grad_input, grad_downs, grad_ups, grads, input, hidden, downs, ups,
        scales=scales, share=share, dropout=dropout, seed=seed, step=step, layer_id=layer_id,
        accumulate=accumulate,
    )  # fmt: skip


def _check_dtypes(name: str, values: Sequence[Tensor | None], input: Tensor) -> None:
    for index, value in enumerate(values):
        if value is not None and value.dtype != input.dtype:
            raise TypeError(
                f"{name}[{index}]: got dtype {value.dtype} beside an input of {input.dtype}, want "
                "one dtype"
            )


def _check_inplace(bases: Sequence[Tensor]) -> None:
    for index, base in enumerate(bases):
        if not base.is_contiguous():
            raise ValueError(
                f"bases[{index}]: got strides {base.stride()} for shape {tuple(base.shape)}, want "
                "a contiguous tensor with inplace=True"
            )
        if base.requires_grad and base.is_leaf and torch.is_grad_enabled():
            raise ValueError(
                "inplace: got True for a leaf that requires grad, want False, or the output of "
                "another operation"
            )


def _can_overwrite(bases: Sequence[Tensor]) -> bool:
    """Whether autograd follows: it takes a view's update for one of the first argument."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return not any(base._is_view() for base in bases)


def _computing(input: Tensor, adapters: Sequence[Tensor]) -> list[Tensor]:
    """Adapters as the native ops take them."""
    dtype = computing_type(input)
    return [
        adapter
        if adapter.dtype is dtype and adapter.is_contiguous()
        else adapter.to(dtype).contiguous()
        for adapter in adapters
    ]


def _draws_from(
    input: Tensor, dropout: float, seed: Tensor | None, step: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if dropout == 0.0:
        return None, None
    if seed is None:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=input.device)
    if step is None:
        step = torch.zeros((), dtype=torch.int64, device=input.device)
    return seed, step


def fake_block_lora_(
    outputs: list[Tensor],
    input: Tensor,
    downs: list[Tensor],
    ups: list[Tensor],
    *,
    scales: Sequence[float],
    share: str = "input",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    layer_id: int = 0,
) -> Tensor:
    return downs[0].new_empty((input.shape[0], sum(down.shape[0] for down in downs)))


def fake_block_lora_backward_(
    grad_input: Tensor | None,
    grad_downs: list[Tensor],
    grad_ups: list[Tensor],
    grads: list[Tensor],
    input: Tensor,
    hidden: Tensor,
    downs: list[Tensor],
    ups: list[Tensor],
    *,
    scales: Sequence[float],
    share: str = "input",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    layer_id: int = 0,
    accumulate: bool = False,
) -> None:
    return None


register(
    Op(
        "block_lora_", "block_lora", block_lora_, check_block_lora_, fake_block_lora_,
        reference.reference_block_lora_,
    )
)  # fmt: skip
register(
    Op(
        "block_lora_backward_", "block_lora", block_lora_backward_, check_block_lora_backward_,
        fake_block_lora_backward_, reference.reference_block_lora_backward_,
    )
)  # fmt: skip
