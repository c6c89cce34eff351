"""Block-LoRA in plain torch, which the layers are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from partune.nn import BlockLoRA
from partune.nn.block_lora import BlockLoRAParts


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
