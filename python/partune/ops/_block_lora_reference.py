"""Family block_lora in plain torch: the oracle of the tests, and the kernel of other devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partune.ops.philox import philox

DRAWS = 2**16  # a feature's draw is one half of a Philox word: 16 bits
DRAWS_PER_COUNTER = 8


def dropout_factors(
    rows: int, columns: int, dropout: float, seed: Tensor, step: Tensor, layer_id: int
) -> Tensor:
    """What each element is multiplied by: 0, or 1/(the share that is kept); float64.

    Element i = row·columns + column takes draw i mod 8 of counter i/8: halves of the four words,
    low half first. It is dropped where its draw is below dropout·2^16, rounded.
    """
    count = rows * columns
    counters = torch.arange(
        (count + DRAWS_PER_COUNTER - 1) // DRAWS_PER_COUNTER, device=seed.device
    )
    words = philox(counters, step=int(step), parameter_id=layer_id, seed=int(seed))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    draws = torch.stack(halves, 1).flatten()[:count].view(rows, columns)
    dropped = dropped_draws(dropout)
    return (draws >= dropped).double() * (DRAWS / (DRAWS - dropped))


def dropped_draws(dropout: float) -> int:
    """How many of the 2^16 draws drop an element; never all."""
    return min(round(dropout * DRAWS), DRAWS - 1)


def _shared_input(
    input: Tensor,
    wide: torch.dtype,
    share: str,
    blocks: int,
    factors: Tensor | None,
) -> Tensor:
    """The features that the down-projection reads, [tokens, width]: chunks summed."""
    read = input.to(wide)
    if factors is not None:
        read = read * factors.to(wide)
    if share == "input":
        read = read.view(input.shape[0], blocks, input.shape[1] // blocks).sum(1)
    return read


def _exact(input: Tensor) -> torch.autocast:
    """Sums in the adapters' dtype, also inside a region of autocast."""
    return torch.autocast(input.device.type, enabled=False)


def _blocks(input: Tensor, down: Tensor, up: Tensor, share: str) -> int:
    if share == "rank":
        return up.shape[0]
    return input.shape[1] // down.shape[1] if down.shape[1] else 1


def _up(up: Tensor, share: str) -> Tensor:
    return up.sum(0) if share == "rank" else up


def reference_block_lora_(
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
    with _exact(input):
        wide = downs[0].dtype
        factors = None
        if dropout > 0.0 and seed is not None and step is not None:
            factors = dropout_factors(input.shape[0], input.shape[1], dropout, seed, step, layer_id)
        read = _shared_input(input, wide, share, _blocks(input, downs[0], ups[0], share), factors)
        hidden = torch.cat([read @ down.t() for down in downs], 1)
        start = 0
        for output, down, up, scale in zip(outputs, downs, ups, scales, strict=True):
            part = hidden[:, start : start + down.shape[0]]
            start += down.shape[0]
            output.copy_(output.to(wide) + part @ (scale * _up(up, share)).t())
    return hidden


def reference_block_lora_backward_(
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
    with _exact(input):
        wide = downs[0].dtype
        blocks = _blocks(input, downs[0], ups[0], share)
        factors = None
        if dropout > 0.0 and seed is not None and step is not None:
            factors = dropout_factors(
                input.shape[0], input.shape[1], dropout, seed, step, layer_id
            ).to(wide)
        read = _shared_input(input, wide, share, blocks, factors)
        inner, start = torch.zeros_like(read), 0
        for index, (grad, down, up, scale) in enumerate(
            zip(grads, downs, ups, scales, strict=True)
        ):
            part = hidden[:, start : start + down.shape[0]]
            start += down.shape[0]
            if grad_ups:
                grad_ups[index].copy_(scale * (grad.to(wide).t() @ part))
            grad_hidden = grad.to(wide) @ (scale * _up(up, share))
            if grad_downs:
                grad_downs[index].copy_(grad_hidden.t() @ read)
            inner += grad_hidden @ down
        if grad_input is not None:
            if share == "input":
                inner = inner.repeat(1, blocks)
            if factors is not None:
                inner = inner * factors
            grad_input.copy_(grad_input.to(wide) + inner if accumulate else inner)
