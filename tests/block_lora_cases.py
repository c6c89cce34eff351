"""Inputs for the tests of family block_lora, and the ops' references on them in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import cuda_emulator
from op_cases import CPU, assert_close
from partune.ops._contract import OPS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHARES = ["input", "rank"]
# tokens, features, and of each member columns and rank; blocks. Odd sizes, more tokens than a tile
# and a block, more columns and ranks than a tile has.
SHAPES: list[tuple[int, int, list[tuple[int, int]], int]] = [
    (0, 6, [(5, 4)], 2), (3, 0, [(4, 2)], 1), (3, 4, [(0, 2)], 1), (1, 1, [(1, 1)], 1),
    (7, 12, [(7, 4), (4, 6)], 3), (63, 128, [(129, 8)], 4), (130, 262, [(67, 18), (300, 2)], 2),
    (1, 1030, [(1100, 16)], 1), (100, 8, [(3, 34), (5, 2), (9, 8)], 2),
]  # fmt: skip
if cuda_emulator.MODE == "tsan":  # which takes twenty times as long
    SHAPES = [
        (0, 6, [(5, 4)], 2), (3, 0, [(4, 2)], 1), (7, 12, [(7, 4), (4, 6)], 3),
        (65, 34, [(67, 18)], 2), (1, 262, [(130, 2)], 1),
    ]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The arguments of family block_lora's ops."""

    input: Tensor
    outputs: list[Tensor]
    grads: list[Tensor]
    downs: list[Tensor]
    ups: list[Tensor]
    options: dict[str, Any]

    def exact(self) -> Case:
        """On the CPU in float64."""
        return self._map(lambda value: value.double().cpu())

    def sizes(self) -> Case:
        """The absolute values: what the ops make of them bounds the sums of their terms."""
        scales = [abs(scale) for scale in self.options["scales"]]
        return replace(
            self._map(lambda value: value.double().cpu().abs()),
            options={**self.options, "scales": scales},
        )

    def _map(self, change: Any) -> Case:
        return Case(
            change(self.input),
            *([change(v) for v in values] for values in self._lists()),
            options=self.options,
        )

    def _lists(self) -> tuple[list[Tensor], ...]:
        return self.outputs, self.grads, self.downs, self.ups

    def forward(self, op: Any) -> tuple[list[Tensor], Tensor]:
        outputs = [output.clone() for output in self.outputs]
        hidden = op(outputs, self.input, self.downs, self.ups, **self.options)
        return outputs, hidden

    def backward(
        self,
        op: Any,
        hidden: Tensor,
        *,
        accumulate: bool = True,
        wanted: tuple[bool, bool, bool] = (True, True, True),
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """The gradients of input, downs and ups; outputs that are only written start as NaN."""
        start = torch.ones_like(self.input)
        grad_input = start if accumulate else start.fill_(torch.nan)
        made = [
            [torch.full_like(value, torch.nan) for value in values] if want else []
            for values, want in zip((self.downs, self.ups), wanted[1:], strict=True)
        ]
        op(
            grad_input if wanted[0] else None, *made, self.grads, self.input, hidden, self.downs,
            self.ups, accumulate=accumulate, **self.options,
        )  # fmt: skip
        return grad_input if wanted[0] else None, *made


def case(
    shape: tuple[int, int, list[tuple[int, int]], int],
    dtype: torch.dtype,
    *,
    share: str = "input",
    dropout: float = 0.0,
    device: torch.device = CPU,
    seed: int = 0,
) -> Case:
    tokens, features, members, blocks = shape
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*size: int, dtype: torch.dtype = dtype, spread: float = 1.0) -> Tensor:
        values = spread * torch.randn(*size, generator=generator, dtype=torch.float64)
        return values.to(device, dtype)

    downs, ups = [], []
    for out, rank in members:
        small = rank**-0.5
        if share == "input":
            downs.append(draw(rank, features // blocks, dtype=wide, spread=0.1))
            ups.append(draw(out, rank, dtype=wide, spread=small))
        else:
            downs.append(draw(rank, features, dtype=wide, spread=0.1))
            ups.append(draw(blocks, out, rank, dtype=wide, spread=small))
    options: dict[str, Any] = {
        "scales": [0.5 + index for index in range(len(members))],
        "share": share,
    }
    if dropout > 0.0:
        options |= {
            "dropout": dropout,
            "seed": torch.tensor(12345678901234, device=device),
            "step": torch.tensor(7, device=device),
            "layer_id": 3,
        }
    return Case(
        draw(tokens, features),
        [draw(tokens, out) for out, _ in members],
        [draw(tokens, out) for out, _ in members],
        downs,
        ups,
        options,
    )


def on_cpu(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}


SUM_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def assert_sums_close(actual: Tensor, exact: Tensor, terms: Tensor) -> None:
    """DESIGN's tolerance of Σ|terms|, element by element."""
    assert actual.shape == exact.shape
    error = (actual.double().cpu() - exact).abs()
    limit = SUM_TOLERANCE[actual.dtype] * terms.clamp_min(1e-30)
    assert (error <= limit).all(), (error / limit).max()


def check_forward(ops: Any, tested: Case) -> Tensor:
    """Outputs and hidden against the reference; hidden, for a backward."""
    reference = OPS["block_lora_"].reference
    outputs, hidden = tested.forward(ops.block_lora_)
    exact, sizes = (replace(c, options=on_cpu(c.options)) for c in (tested.exact(), tested.sizes()))
    for mine, theirs in zip(outputs, exact.forward(reference)[0], strict=True):
        assert_close(mine, theirs.to(mine.dtype))
    assert_sums_close(hidden, exact.forward(reference)[1], sizes.forward(reference)[1])
    return hidden


def check_backward(ops: Any, tested: Case, hidden: Tensor, **options: Any) -> None:
    reference = OPS["block_lora_backward_"].reference
    mine = tested.backward(ops.block_lora_backward_, hidden, **options)
    wide = hidden.double().cpu()
    exact, sizes = (replace(c, options=on_cpu(c.options)) for c in (tested.exact(), tested.sizes()))
    theirs = exact.backward(reference, wide, **options)
    terms = sizes.backward(reference, wide.abs(), **options)
    if mine[0] is not None:
        assert_close(mine[0], theirs[0].to(mine[0].dtype))
    for own, other, size in zip(mine[1:], theirs[1:], terms[1:], strict=True):
        for a, b, bound in zip(own, other, size, strict=True):
            assert_sums_close(a, b, bound)
