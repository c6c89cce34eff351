"""What the tests of sparse layers share: models, given selections, and training in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from partune.nn import SparseConfig, attach
from partune.nn._sparse_entries import SparseEntries
from partune.nn._sparse_layers import SparseLayer
from partune.ops.csr import flat_indices, mask_from_csr
from partune.selection import Scores, Selection


@dataclass(frozen=True)
class Scattered(Selection):
    """Some entries of every matrix, by no rule that a test could lean on; none of the last row."""

    seed: int = 0

    def propose(self, weight, grad, state):
        generator = torch.Generator().manual_seed(self.seed + 1000 * state["parameter_id"])
        scores = torch.rand(weight.shape, generator=generator)
        scores[-1] = 0.0
        return Scores(scores)


def two_layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 33), nn.GELU(), nn.Linear(33, 10)).to(dtype)


def sparse(model: nn.Module, density: float = 0.2, **options: object) -> nn.Module:
    return attach(model, SparseConfig(selection=Scattered(), density=density, **options))


def sparse_layers(model: nn.Module) -> list[SparseLayer]:
    return [module for module in model.modules() if isinstance(module, SparseLayer)]


def values_of(model: nn.Module) -> list[nn.Parameter]:
    return [layer.adapter.values for layer in sparse_layers(model)]


def mask_of(entries: SparseEntries) -> Tensor:
    return mask_from_csr(*entries.csr, entries.columns)


def selected(weight: Tensor, entries: SparseEntries) -> Tensor:
    return weight.reshape(-1)[flat_indices(*entries.csr, entries.columns)]


def assert_written(model: nn.Module) -> None:
    """Every weight holds its values, rounded."""
    for layer in sparse_layers(model):
        held = selected(layer.weight, layer.adapter)
        assert torch.equal(held, layer.adapter.values.detach().to(held.dtype))


class Masked:
    """The same training in plain torch: dense weights, gradients set to zero where not selected."""

    def __init__(self, plain: nn.Module, adapted: nn.Module) -> None:
        self.plain = plain.requires_grad_(False)
        self.masks: dict[nn.Parameter, Tensor] = {}
        for name, module in adapted.named_modules():
            if isinstance(module, SparseLayer):
                weight = plain.get_submodule(name).weight
                self.masks[weight.requires_grad_(True)] = mask_of(module.adapter)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.masks)

    def mask_gradients(self) -> None:
        for weight, mask in self.masks.items():
            weight.grad.mul_(mask)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    between: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
    inputs: int = 24,
) -> None:
    """A regression; `between` runs before each optimizer step, `after` after it."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(6, inputs, generator=generator).to(dtype)
        y = torch.randn(6, 10, generator=generator).to(dtype)
        (model(x) - y).square().mean().backward()
        between()
        optimizer.step()
        optimizer.zero_grad()
        after()
