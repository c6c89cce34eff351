"""Family block_lora: the checks that its wrappers and its fake kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partune.ops import _checks as check

SHARES = ("input", "rank")


def computing_type(input: Tensor) -> torch.dtype:
    """What adapters are stored in and sums are formed in."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _member_count(name: str, values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{name}: got {len(values)} entries, want {count}, one per member")


def _check_rows(
    name: str, value: Any, like: Tensor, columns: int | None, index: int | None = None
) -> None:
    """[tokens, columns], contiguous, of the input's dtype and device."""
    check.tensor(name, value, like.device, index)
    check.dtype(name, value, (like.dtype,), index)
    if value.dim() != 2 or value.shape[0] != like.shape[0] or columns not in (None, value.shape[1]):
        wanted = f"({like.shape[0]}, {'columns' if columns is None else columns})"
        raise ValueError(
            f"{check.label(name, index)}: got shape {tuple(value.shape)}, want {wanted}"
        )
    check.contiguous(name, value, index)


def _check_features(
    input: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], share: str
) -> None:
    """Adapters that fit the input's features and each other, all cut into as many blocks."""
    features = input.shape[-1]
    check.one_of("share", share, SHARES)
    check.tensors("downs", downs, input.device)
    check.tensors("ups", ups, input.device)
    if not downs:
        raise ValueError("downs: got no entries, want at least one member")
    _member_count("ups", ups, len(downs))
    first = None
    for index, (down, up) in enumerate(zip(downs, ups, strict=True)):
        blocks = _check_member(features, down, up, share, index)
        first = blocks if first is None else first
        if blocks != first:
            raise ValueError(
                f"downs[{index}]: got {blocks} blocks beside {first}, want one number of blocks "
                "per call"
            )


def _check_member(features: int, down: Tensor, up: Tensor, share: str, index: int) -> int:
    """Of one member; how many blocks it is cut into."""
    if down.dim() != 2 or down.shape[0] == 0:
        raise ValueError(
            f"downs[{index}]: got shape {tuple(down.shape)}, want a matrix with a row per rank"
        )
    rank, width = down.shape
    if share == "rank":
        if width != features:
            raise ValueError(
                f"downs[{index}]: got shape {tuple(down.shape)}, want ({rank}, {features}): "
                "share='rank' cuts the rank, not the features"
            )
        if up.dim() != 3 or up.shape[0] == 0 or up.shape[2] != rank:
            raise ValueError(
                f"ups[{index}]: got shape {tuple(up.shape)}, want (blocks, out, {rank})"
            )
        return up.shape[0]
    if features != width and (width == 0 or features % width != 0):
        raise ValueError(
            f"downs[{index}]: got shape {tuple(down.shape)}, want ({rank}, {features}/blocks): the "
            f"number of blocks must divide the input's {features} features"
        )
    if up.dim() != 2 or up.shape[1] != rank:
        raise ValueError(f"ups[{index}]: got shape {tuple(up.shape)}, want (out, {rank})")
    return features // width if width else 1


def check_dropout(
    device: torch.device, dropout: float, seed: Tensor | None, step: Tensor | None, layer_id: int
) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: got {dropout}, want 0 <= dropout < 1")
    check.parameter_id("layer_id", layer_id)
    for name, value in (("seed", seed), ("step", step)):
        if value is not None:
            check.scalar(name, value, (torch.int64,), device)


def _check_task(
    input: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    share: str,
    dropout: float,
    seed: Tensor | None,
    step: Tensor | None,
    layer_id: int,
) -> None:
    """What the two native ops have in common."""
    check.tensor("input", input, None)
    check.dtype("input", input, check.FLOATING)
    if input.dim() != 2:
        raise ValueError(f"input: got shape {tuple(input.shape)}, want (tokens, features)")
    check.contiguous("input", input)
    _check_features(input, downs, ups, share)
    for name, values in (("downs", downs), ("ups", ups)):
        for index, value in enumerate(values):
            check.dtype(name, value, (computing_type(input),), index)
            check.contiguous(name, value, index)
    _member_count("scales", scales, len(downs))
    check_dropout(input.device, dropout, seed, step, layer_id)
    if dropout > 0.0 and (seed is None or step is None):
        raise ValueError(f"{'seed' if seed is None else 'step'}: got None, want it with dropout")


def check_block_lora_(
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
) -> None:
    _check_task(input, downs, ups, scales, share, dropout, seed, step, layer_id)
    check.tensors("outputs", outputs, input.device)
    _member_count("outputs", outputs, len(downs))
    for index, (output, up) in enumerate(zip(outputs, ups, strict=True)):
        _check_rows("outputs", output, input, up.shape[-2], index)


def check_block_lora_backward_(
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
    _check_task(input, downs, ups, scales, share, dropout, seed, step, layer_id)
    check.tensors("grads", grads, input.device)
    _member_count("grads", grads, len(downs))
    for index, (grad, up) in enumerate(zip(grads, ups, strict=True)):
        _check_rows("grads", grad, input, up.shape[-2], index)
    if grad_input is not None:
        _check_rows("grad_input", grad_input, input, input.shape[1])
    check.tensor("hidden", hidden, input.device)
    check.dtype("hidden", hidden, (computing_type(input),))
    check.shape("hidden", hidden, (input.shape[0], sum(down.shape[0] for down in downs)))
    check.contiguous("hidden", hidden)
    for name, values, likes in (("grad_downs", grad_downs, downs), ("grad_ups", grad_ups, ups)):
        check.tensors(name, values, input.device)
        if not values:
            continue
        _member_count(name, values, len(likes))
        for index, (value, like) in enumerate(zip(values, likes, strict=True)):
            check.dtype(name, value, (like.dtype,), index)
            check.shape(name, value, like.shape, index)
            check.contiguous(name, value, index)


def check_adapters(input: Any, downs: Any, ups: Any, scales: Sequence[float], share: str) -> None:
    """Adapters of a group, and the input that they read."""
    check.tensor("input", input, None)
    check.dtype("input", input, check.FLOATING)
    if input.dim() == 0:
        raise ValueError("input: got a 0-d tensor, want (..., features)")
    _check_features(input, downs, ups, share)
    _member_count("scales", scales, len(downs))


def check_linears(
    weights: Any, biases: Sequence[Any], input: Tensor, ups: Sequence[Tensor]
) -> None:
    """The frozen linears of a group."""
    check.tensors("weights", weights, input.device)
    _member_count("weights", weights, len(ups))
    _member_count("biases", biases, len(ups))
    for index, (weight, bias, up) in enumerate(zip(weights, biases, ups, strict=True)):
        check.shape("weights", weight, (up.shape[-2], input.shape[-1]), index)
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"weights[{index}]: it requires grad, want a frozen weight: call "
                "requires_grad_(False) on it; only adapters, biases and the input get gradients"
            )
        if bias is not None:
            check.tensor("biases", bias, input.device, index)
            check.shape("biases", bias, (weight.shape[0],), index)


def check_bases(bases: Any, input: Tensor, ups: Sequence[Tensor]) -> None:
    """The results of frozen layers, to which the adapters' parts are added."""
    check.tensors("bases", bases, input.device)
    _member_count("bases", bases, len(ups))
    for index, (base, up) in enumerate(zip(bases, ups, strict=True)):
        check.dtype("bases", base, check.FLOATING, index)
        check.same_dtype("bases", base, bases[0].dtype, index)
        check.shape("bases", base, (*input.shape[:-1], up.shape[-2]), index)
