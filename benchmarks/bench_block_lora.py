"""Family block_lora over the frozen linear, beside peft's LoRA, forward and backward together.

The frozen linear is torch's, which ours needn't be: what the adapter adds to the product that it
comes with, `frozen_linear`, is printed beside.
"""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

from conftest import SHARE_OF_BAR, Comparison, copy_bandwidth
from partune import ops
from partune.nn import BlockLoRALinear

FORWARD = torch.ops.partune.block_lora_.default
BACKWARD = torch.ops.partune.block_lora_backward_.default
# tokens, in, out; and the most that adapters may take of a frozen step.
SHAPES = {(2048, 1024, 1024): 1.10, (2048, 1024, 4096): 1.10, (512, 4096, 4096): 1.05}
DTYPES = [torch.float32, torch.bfloat16]
DROPOUT = 0.05
FROZEN, OWN, PEFT = "the frozen linear", "frozen_linear", "peft's LoRA"
HAS_BARS = SHARE_OF_BAR == 1


class Layer:
    """A frozen linear, the same with our adapter and with peft's, and a step through each."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        rank: int,
        dropout: float = 0.0,
        blocks: int = 2,
    ) -> None:
        tokens, features, out = shape
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        self.x = draw(tokens, features, dtype=dtype).requires_grad_()
        self.grad = draw(tokens, out, dtype=dtype)
        self.linear = linear = nn.Linear(features, out, dtype=dtype).requires_grad_(False)
        self.ours = BlockLoRALinear.from_linear(linear, rank=rank, blocks=blocks, dropout=dropout)
        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=["0"]
        )
        self.peft = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]

    def frozen(self, x: Tensor) -> Tensor:
        return ops.frozen_linear(x, self.linear.weight, self.linear.bias)

    def run(self, function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        parameters = function.parameters() if isinstance(function, nn.Module) else ()
        wanted = [self.x, *(p for p in parameters if p.requires_grad)]
        return lambda: torch.autograd.grad(function(self.x), wanted, self.grad)

    def compare(self, rounds: int) -> Comparison:
        ways = {"ours": self.ours, FROZEN: self.linear, OWN: self.frozen, PEFT: self.peft}
        return Comparison({name: self.run(way) for name, way in ways.items()}, rounds)


def overheads(
    note: Callable[[str], None], name: str, comparison: Comparison
) -> tuple[float, float]:
    """What ours and peft's add to the frozen step, as shares of it."""

    def over(name: str, frozen: str) -> float:
        return comparison.median[name] / comparison.median[frozen] - 1

    ours, pefts = over("ours", FROZEN), over(PEFT, FROZEN)
    note(
        f"{name}: {ours:+.1%} over the frozen linear, {over('ours', OWN):+.1%} over the product "
        f"that it comes with, peft {pefts:+.1%}"
    )
    return ours, pefts


on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
on_ranks = pytest.mark.parametrize("rank", [8, 16], ids=lambda r: f"r{r}")


@on_shapes
@on_dtypes
@on_ranks
def test_over_the_frozen_linear(report, note, request, shape, dtype, rank) -> None:
    comparison = Layer(shape, dtype, rank).compare(rounds=11)
    ours, pefts = overheads(note, request.node.name, comparison)
    report(comparison, {FROZEN: 1 / SHAPES[shape] if HAS_BARS else 0.0}, rounds=1)
    assert not HAS_BARS or ours <= pefts / 2


@on_shapes
@on_dtypes
def test_with_dropout(report, note, request, shape, dtype) -> None:
    comparison = Layer(shape, dtype, 16, DROPOUT).compare(rounds=11)
    overheads(note, request.node.name, comparison)
    report(comparison, {PEFT: 1.3 if HAS_BARS else 0.0}, rounds=1)


@on_shapes
@on_dtypes
def test_adapters_alone(report, shape, dtype) -> None:
    """The two native ops, without a frozen product, beside torch's thin ones in the input's dtype.

    A rank-16 plain LoRA; what torch's take is the least that a LoRA in plain torch can add.
    """
    tokens, features, out = shape
    x, y, grad = (torch.randn(tokens, n).to(dtype) for n in (features, out, out))
    grad_input = torch.randn(tokens, features).to(dtype)
    downs, ups = [torch.randn(16, features)], [torch.randn(out, 16)]
    grad_downs, grad_ups = [torch.empty_like(downs[0])], [torch.empty_like(ups[0])]
    options = {"scales": [1.0], "share": "input", "dropout": 0.0, "seed": None, "step": None}
    down, up = downs[0].to(dtype), ups[0].to(dtype)

    def ours() -> None:
        hidden = FORWARD([y], x, downs, ups, layer_id=0, **options)
        BACKWARD(
            grad_input, grad_downs, grad_ups, [grad], x, hidden, downs, ups,
            layer_id=0, accumulate=True, **options,
        )  # fmt: skip

    def torchs() -> tuple[Tensor, Tensor]:
        hidden = x @ down.T
        y.addmm_(hidden, up.T)
        grad_hidden = grad @ up
        grad_input.addmm_(grad_hidden, down)
        return grad_hidden.T @ x, grad.T @ hidden

    comparison = Comparison({"ours": ours, "torch": torchs, "copy": copy_bandwidth()}, rounds=11)
    numbers = 2 * x.numel() + 3 * y.numel() + 2 * grad_input.numel()
    report(comparison, {"torch": 0.0}, numbers * x.element_size())
