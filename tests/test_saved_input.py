"""Layers behind a product save its factors, which autograd keeps anyway, and not the product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from partune.nn import BlockLoRAConfig, SparseConfig, attach
from partune.ops._saved_input import input_of, saved_of
from partune.selection import Magnitude

KINDS = {
    "sparse": SparseConfig(selection=Magnitude(), density=0.2),
    "block_lora": BlockLoRAConfig(rank=2, blocks=1),
    "dropout": BlockLoRAConfig(rank=2, blocks=1, dropout=0.3),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


class GatedMLP(nn.Module):
    """As Llama's; `down` is called through something that tests choose."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(20, 6)
        self.through: Callable[[Tensor], Tensor] = lambda product: self.down(product)

    def forward(self, x: Tensor) -> Tensor:
        product = nn.functional.silu(self.gate(x)) * self.up(x)
        self.product = StorageWeakRef(product.untyped_storage())
        return self.through(product)


def mlp(kind: str, dtype: torch.dtype = torch.float32) -> GatedMLP:
    torch.manual_seed(0)
    model = attach(GatedMLP().to(dtype), KINDS[kind])
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter)  # of an adapter, which begins as zero
    return model


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2)).to(dtype)


def step(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output, then the gradients of the input and of what trains."""
    leaf = x.clone().requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    torch.manual_seed(1)
    output = run(leaf)
    output.square().sum().backward()
    return [value.clone() for value in (output.detach(), leaf.grad, *(p.grad for p in trained))]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) >= 5
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e) and a.any()


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_product_is_freed_and_every_bit_is_the_same(kind: str, dtype: torch.dtype) -> None:
    model, x = mlp(kind, dtype), tokens(dtype)
    actual = step(model, model, x)
    output = model(x)
    assert model.product.expired()
    output.sum().backward(retain_graph=True)
    output.sum().backward()
    model.through = lambda product: model.down(product.view_as(product))  # which hides it
    assert_same(actual, step(model, model, x))
    output = model(x)
    assert not model.product.expired()


@each_kind
def test_checkpointing_and_offloading(kind: str) -> None:
    model, x = mlp(kind), tokens()
    expected = step(model, model, x)
    for reentrant in (False, True):
        run = lambda x, r=reentrant: checkpoint(model, x, use_reentrant=r)  # noqa: E731
        assert_same(step(model, run, x), expected)
        model.through = lambda p, r=reentrant: checkpoint(model.down, p, use_reentrant=r)
        assert_same(step(model, model, x), expected)
        model.through = lambda product: model.down(product)
    with torch.autograd.graph.save_on_cpu():
        assert_same(step(model, model, x), expected)


def test_hooks_get_the_input_itself_and_are_asked_for_nothing() -> None:
    packed: list[Tensor] = []
    asked: list[Tensor] = []
    products: list[Tensor] = []
    model = mlp("sparse")
    model.through = lambda product: (products.append(product), model.down(product))[1]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (packed.append(t), t)[1], lambda t: (asked.append(t), t)[1]
    ):
        model(tokens().requires_grad_())
    assert not asked
    assert any(t.data_ptr() == products[0].data_ptr() for t in packed)


def changed(value: Tensor) -> Tensor:
    with torch.no_grad():
        value.add_(1.0)
    return value


def factors() -> tuple[Tensor, Tensor]:
    """No leaves, so that they may be changed in place."""
    return tuple(torch.randn(4, 6).requires_grad_().sin() for _ in range(2))


def product_with_changed_factor() -> Tensor:
    a, b = factors()
    product = a * b
    changed(b)
    return product


def product_of_subclass() -> Tensor:
    a, b = factors()
    return a.as_subclass(type("Other", (Tensor,), {})).mul(b).as_subclass(Tensor)


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: torch.randn(4, 6),
        lambda a, b: torch.randn(4, 6).requires_grad_(),
        lambda a, b: a + b,
        lambda a, b: a * 2.0,
        lambda a, b: a * b.detach(),
        lambda a, b: a * b[0],
        lambda a, b: a * b.double().float().bfloat16(),
        lambda a, b: changed(a * b),
        lambda a, b: (a * b).view(6, 4),
        lambda a, b: product_with_changed_factor(),
        lambda a, b: product_of_subclass(),
    ],
    ids=[
        "no graph", "leaf", "sum", "by a number", "by a constant", "by a row", "of two dtypes",
        "changed", "view", "of a changed factor", "of a subclass",
    ],
)  # fmt: skip
def test_what_is_saved_itself(make: Callable[[Tensor, Tensor], Tensor]) -> None:
    input = make(*factors())
    first, second = saved_of(input)
    assert first is input and second is None
    assert input_of(first, second) is input


def test_factors_are_theirs_who_made_them() -> None:
    a, b = factors()
    first, second = saved_of(a * b)
    assert first.data_ptr() == a.data_ptr() and second.data_ptr() == b.data_ptr()
    assert not first.requires_grad and not second.requires_grad
    assert torch.equal(input_of(first, second), a * b)


def test_in_place_changes_between_forward_and_backward() -> None:
    model, (a, b) = mlp("sparse"), (torch.randn(4, 20).requires_grad_().sin() for _ in range(2))
    values = model.down.adapter.values
    product = a * b
    output = model.down(product).sum()
    (expected,) = torch.autograd.grad(output, values, retain_graph=True)
    changed(product)
    assert torch.equal(torch.autograd.grad(output, values, retain_graph=True)[0], expected)
    changed(a)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output, values)
