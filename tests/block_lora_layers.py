"""Block-LoRA in plain torch, which the layers are compared with, and what its tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nn_models import OWN, disturbed, inputs_of, output_of, transformers_model
from partune.nn import BlockLoRA, BlockLoRALinear
from partune.nn._block_lora_layers import BlockLoRALayer
from partune.nn.block_lora import BlockLoRAParts

KINDS = ["vit", "swin", "clip", "llama", "gpt2", "bert", "timm-vit"]
SMALL = dict(rank=4, blocks=2, alpha=6.0)


def trained(model: nn.Module, size: float = 0.3) -> nn.Module:
    """The model with up-projections off their start, at which nothing is added."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BlockLoRA):
                module.up.normal_(0.0, size)
    return model


def plain_product(x: Tensor, factors: BlockLoRA) -> Tensor:
    """What the paper's formula adds, block by block, in float64 where x is; autograd by torch."""
    down, up = factors.down.to(x.dtype), factors.up.to(x.dtype)
    if factors.share == "rank":
        arms = [x @ down.t() @ arm.t() for arm in up]
        return factors.scale * sum(arms[1:], arms[0])
    blocks = [chunk @ down.t() @ up.t() for chunk in x.chunk(factors.blocks, dim=-1)]
    return factors.scale * sum(blocks[1:], blocks[0])


class PlainLayer(nn.Module):
    """What users write today: the frozen layer, then the product added to its output."""

    def __init__(self, layer: nn.Module, adapter: nn.Module, starts: dict[str, int]) -> None:
        super().__init__()
        self.layer, self.adapter, self.starts = layer, adapter, starts

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if isinstance(self.adapter, BlockLoRA):
            return y + plain_product(x, self.adapter)
        assert isinstance(self.adapter, BlockLoRAParts)
        pieces = []
        for name, factors in self.adapter.named_children():
            part = torch.zeros_like(y)
            size = factors.up.shape[-2]
            part[..., self.starts[name] : self.starts[name] + size] = plain_product(x, factors)
            pieces.append(part)
        return y + sum(pieces[1:], pieces[0])


def pair(
    dtype: torch.dtype, options: dict[str, Any], shape: tuple[int, ...] = (3, 5), bias: bool = True
) -> tuple[BlockLoRALinear, PlainLayer, Tensor, Tensor]:
    """A layer, the same in plain torch, and an input for each that wants gradients."""
    layer = BlockLoRALinear(24, 10, bias, dtype=dtype, **options)
    layer = trained(layer)
    base = nn.Linear(24, 10, bias, dtype=dtype).requires_grad_(False)
    base.load_state_dict({k: v for k, v in layer.state_dict().items() if "block_lora" not in k})
    plain = PlainLayer(base, copy.deepcopy(layer.adapter), {})
    x = torch.randn(*shape, 24, dtype=dtype)
    return layer, plain, x.clone().requires_grad_(), x.clone().requires_grad_()


def assert_close(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    got, wanted = got.detach().double(), wanted.detach().double()
    assert got.shape == wanted.shape, what
    error, size = float((got - wanted).abs().max()), float(wanted.abs().max())
    assert error <= tolerance * size, f"{what}: {error:g}, largest {size:g}"


def layers(model: nn.Module) -> dict[str, BlockLoRALayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockLoRALayer)}


def model_and_output(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A model, and what computes its output on some input."""
    if kind in OWN:
        images = torch.randn(2, 3, 16, 16)
        return disturbed(OWN[kind]()), lambda model: model(images)
    inputs = inputs_of(kind)
    return transformers_model(kind), lambda model: output_of(model, inputs)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max().detach() / wanted.abs().max().detach())
