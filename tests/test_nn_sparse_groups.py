"""Sparse layers that read one tensor are computed together: which, when, and that none notice."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nn_models import inputs_of, output_of, transformers_model
from partune.nn import detach, disable_adapter
from partune.nn._sparse_groups import KEY, Group
from sparse_layers import sparse, sparse_layers, values_of


class Attention(nn.Module):
    """q and k read one tensor, out another; tests may choose what happens in between."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(12, 20, bias=bias), nn.Linear(12, 20, bias=bias)
        self.out = nn.Linear(20, 12)
        self.between: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        q = self.q(x)
        return self.out(torch.relu(q) + self.k(self.between(x)))


def attention(dtype: torch.dtype = torch.float32, **options: bool) -> Attention:
    torch.manual_seed(0)
    return sparse(Attention(**options).to(dtype), density=0.3)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def groups_of(model: nn.Module) -> list[Group]:
    found = [layer.__dict__.get(KEY) for layer in sparse_layers(model)]
    return list({id(group): group for group in found if isinstance(group, Group)}.values())


def step(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """A step of training, with no learning: groups are formed, weights stay."""
    optimizer = torch.optim.SGD(values_of(model), lr=0.0)
    output = (model if run is None else run)(x.clone().requires_grad_())
    output.square().sum().backward()
    optimizer.step()
    return output


def grouped(**options: bool) -> Attention:
    model = attention(**options)
    step(model, tokens())
    assert [group.members for group in groups_of(model)] == [[model.q, model.k]]
    return model


def results(
    model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """The output, then the gradients of input, values and biases."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    output = (model if run is None else run)(leaf)
    output.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [output.detach(), leaf.grad, *(grad.clone() for grad in grads)]


def assert_alike(got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert len(got) == len(wanted) > 3
    for a, b in zip(got, wanted, strict=True):
        assert (a.double() - b.double()).abs().max() <= limit * b.double().abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_together_they_compute_what_they_did_alone(dtype: torch.dtype, bias: bool) -> None:
    model, x = attention(dtype, bias=bias), tokens(dtype)
    for layer in (model.q, model.k, model.out):
        if bias:
            layer.bias.requires_grad_(True)
    alone = results(model, x)
    assert not groups_of(model)
    step(model, x)
    (group,) = groups_of(model)
    assert group.members == [model.q, model.k] and model.out.__dict__[KEY] is None
    nodes: list[object] = []
    handles = [
        layer.register_forward_hook(lambda _, __, output: nodes.append(output.grad_fn))
        for layer in group.members
    ]
    assert_alike(results(model, x), alone, dtype)
    assert nodes[0] is nodes[1], "one node of the graph"
    for handle in handles:
        handle.remove()
    assert not group.outputs and group.input is None and not group.failed


def test_of_a_decoder() -> None:
    model, inputs = transformers_model("llama"), inputs_of("llama")
    model = sparse(model.train())
    alone = output_of(model, inputs)
    optimizer = torch.optim.SGD(values_of(model), lr=0.0)
    alone.square().sum().backward()
    expected = [value.grad.clone() for value in values_of(model)]
    optimizer.step()
    names = {layer: name.split(".")[-1] for name, layer in model.named_modules()}
    members = [[names[layer] for layer in group.members] for group in groups_of(model)]
    assert members == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2
    model.zero_grad()
    together = output_of(model, inputs)
    together.square().sum().backward()
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close([value.grad for value in values_of(model)], expected)


def test_training_goes_the_same_way() -> None:
    models = [attention(torch.float64), attention(torch.float64)]
    for model in models:
        optimizer = torch.optim.AdamW(values_of(model), lr=0.01)
        for _ in range(6):
            if model is models[0]:
                for layer in sparse_layers(model):
                    layer.__dict__[KEY] = None
            model.zero_grad()
            model(tokens(torch.float64)).square().sum().backward()
            optimizer.step()
    assert not groups_of(models[0]) and len(groups_of(models[1])) == 1
    torch.testing.assert_close(values_of(models[1]), values_of(models[0]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """From the first step on, in which nothing changes between a forward and the next."""
    model, x = attention(), tokens()
    alone = results(model, x)

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)

    for _ in range(3):
        assert_alike(results(model, x, run), alone, torch.float32)
        step(model, x, run)
    assert len(groups_of(model)) == 1


def test_what_isnt_asked_for_gets_no_gradient() -> None:
    model = grouped()
    model.zero_grad()
    h = torch.tanh(tokens()).requires_grad_()
    q, k = model.q(h), model.k(h)
    assert q.grad_fn is k.grad_fn
    q.sum().backward()
    assert model.q.adapter.values.grad is not None and model.k.adapter.values.grad is None
    torch.testing.assert_close(h.grad, model.q.weight.sum(0).expand_as(h))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model.q(h).square().sum(), h, create_graph=True)


def add_one_(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.add_(1.0)


@pytest.mark.parametrize(
    "between",
    [lambda x: x.clone(), lambda x: x * 2.0, add_one_],
    ids=["a copy", "another", "changed in place"],
)
def test_layers_that_turn_out_to_read_apart(between: Callable[[Tensor], Tensor]) -> None:
    model, x = grouped(), tokens()
    other = attention()
    with torch.no_grad():  # computes by itself
        model.between = other.between = between
        expected = other(x)
        assert torch.equal(model(x), expected)
    model.zero_grad()
    output = model(x)
    torch.testing.assert_close(output, expected)
    (group,) = groups_of(model)
    assert group.failed
    torch.optim.SGD(values_of(model), lr=0.0).step()
    assert not groups_of(model) and not group.outputs and group.input is None
    model.between = lambda x: x
    for _ in range(2):
        step(model, x)
    assert not groups_of(model), "for good"


def test_one_that_isnt_called_any_more() -> None:
    model, x = grouped(), tokens()
    model.q(x).sum().backward()
    (group,) = groups_of(model)
    assert list(group.outputs) == [model.k]
    torch.optim.SGD(values_of(model), lr=0.0).step()
    assert not groups_of(model) and not group.outputs and group.input is None


def test_another_autocast_computes_anew() -> None:
    model, x = grouped(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.q(x).dtype == torch.bfloat16
    assert model.k(x).dtype == torch.float32
    model = grouped()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k = model.q(x), model.k(x)
    assert q.dtype == k.dtype == torch.bfloat16 and q.grad_fn is k.grad_fn


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_a_layer_that_is_prepared_for_its_call(how: str) -> None:
    """As offloading does, which fetches a weight just before."""
    model, x = grouped(), tokens()
    expected = results(model, x)
    calls: list[bool] = []
    weight = model.k.weight.detach().clone()

    def fetch(*_: object) -> None:
        calls.append(True)
        model.k.weight.data.copy_(weight)

    if how == "hook":
        model.k.register_forward_pre_hook(fetch)
    else:
        own = model.k.forward
        model.k.forward = lambda x: (fetch(), own(x))[1]
    model.k.weight.data.zero_()
    got = results(model, x)
    assert calls == [True]
    assert_alike(got[:1] + got[2:], expected[:1] + expected[2:], torch.float32)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_find_groups_of_their_own(how: str) -> None:
    model = grouped()
    model.q(tokens())  # with an output that waits
    model.between = None  # type: ignore[assignment]  # a lambda can't be pickled
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert all(KEY not in layer.__dict__ for layer in sparse_layers(twin))
    twin.between = lambda x: x
    step(twin, tokens())
    assert [group.members for group in groups_of(twin)] == [[twin.q, twin.k]]
    assert [group.members for group in groups_of(model)] == [[model.q, model.k]]


def test_disabled_and_detached() -> None:
    model, x = grouped(), tokens()
    with disable_adapter(model):
        assert all(KEY not in layer.__dict__ for layer in (model.q, model.k))
        model(x)
    step(model, x)
    assert len(groups_of(model)) == 1
    detach(model)
    assert all(KEY not in module.__dict__ for module in model.modules())


def test_compiled_whole() -> None:
    model, x = grouped(), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    assert_alike(results(model, x, compiled), results(model, x), torch.float32)


def test_stale_values_are_refused_by_name() -> None:
    model, x = grouped(), tokens()
    with torch.no_grad():
        model.k.adapter.values.add_(1.0)
    with pytest.raises(RuntimeError, match="values: they have changed since they were written"):
        model(x)
