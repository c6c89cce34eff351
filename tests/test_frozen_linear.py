"""The product of frozen linears, by whichever of torch's libraries."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_models import torchs_products
from partune import _native
from partune.nn import (
    BlockLoRAConfig,
    BlockLoRALinear,
    ScaleShiftConfig,
    SparseConfig,
    SparseLinear,
    attach,
    detach,
    disable_adapter,
    merge,
)
from partune.nn._layers import FrozenLinear
from partune.ops import frozen_linear
from partune.ops._contract import below_autograd
from partune.ops.frozen_linear import product
from partune.selection import Magnitude

MODULE = importlib.import_module(product.__module__)


@pytest.fixture(params=["onednn", "torch"])
def library(request, monkeypatch) -> str:
    """Both, whichever this machine would take."""
    monkeypatch.setattr(MODULE, "onednn_is_faster", lambda: request.param == "onednn")
    return request.param


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What ran: "onednn" or "torch", one for each product."""
    ran: list[str] = []
    by_onednn = MODULE._by_onednn

    def record(*args) -> bool:
        ran.append("onednn" if by_onednn(*args) else "torch")
        return ran[-1] == "onednn"

    monkeypatch.setattr(MODULE, "_by_onednn", record)
    return ran


def close(actual: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=limit, atol=10 * limit)


def strided(kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return {
        "contiguous": lambda: torch.randn(rows, columns, dtype=dtype),
        "transposed": lambda: torch.randn(columns, rows, dtype=dtype).t(),
        "rows of a wider one": lambda: torch.randn(rows, columns + 5, dtype=dtype)[:, 3:-2],
        "every second": lambda: torch.randn(2 * rows, 2 * columns, dtype=dtype)[::2, ::2],
        "expanded": lambda: torch.randn(1, columns, dtype=dtype).expand(rows, columns),
    }[kind]()


KINDS = ("contiguous", "transposed", "rows of a wider one", "every second", "expanded")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_kind", KINDS)
@pytest.mark.parametrize("input_kind", KINDS)
def test_any_strides(library, input_kind, weight_kind, dtype):
    torch.manual_seed(0)
    x, weight = strided(input_kind, 24, 17, dtype), strided(weight_kind, 10, 17, dtype)
    bias = torch.randn(20, dtype=dtype)[::2]
    wanted = x.double() @ weight.double().t()
    close(product(x, weight), wanted, dtype)
    close(product(x, weight, bias), wanted + bias.double(), dtype)
    onto = torch.randn(24, 10, dtype=dtype)
    wanted += onto.double()
    close(product(x, weight, onto=onto), wanted, dtype)


@pytest.mark.parametrize(
    "shape", [(17,), (8, 17), (2, 3, 4, 17), (0, 17), (3, 0, 17), (1, 17)], ids=str
)
def test_leading_dimensions(library, shape):
    x, weight = torch.randn(shape), torch.randn(10, 17)
    with below_autograd():
        output = product(x, weight)
    assert output.shape == (*shape[:-1], 10)
    assert not output._is_view()
    close(output, x @ weight.t())


def test_what_follows_may_write_into_the_output(library):
    x, weight = torch.randn(2, 8, 17, requires_grad=True), torch.randn(10, 17)
    for run in (frozen_linear, F.linear):
        run(x, weight).mul_(2.0).sum().backward()
    close(x.grad, 4.0 * weight.sum(0).expand_as(x))
    sparse = SparseLinear(17, 10, selection=Magnitude())
    lora = BlockLoRALinear(17, 10, rank=2, blocks=1)
    for layer in (sparse, lora):
        x.grad = None
        layer(x).mul_(2.0).sum().backward()
        close(x.grad, 2.0 * layer.weight.detach().sum(0).expand_as(x))


def test_no_features(library):
    bias = torch.randn(10)
    assert torch.equal(product(torch.empty(16, 0), torch.empty(10, 0), bias), bias.expand(16, 10))
    assert product(torch.empty(16, 4), torch.empty(0, 4)).shape == (16, 0)


def test_gradients_of_any_order(library):
    torch.manual_seed(0)
    x = torch.randn(3, 8, 17, requires_grad=True)
    weight, bias = torch.randn(10, 17), torch.randn(10)
    firsts, seconds = [], []
    for function in (frozen_linear, F.linear):
        output = function(x, weight, bias)
        (first,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        firsts.append(first.detach()), seconds.append(second)
    close(*firsts), close(*seconds)


def test_saves_the_weight_alone(library):
    saved: list[Tensor] = []
    x, weight = torch.randn(16, 17, requires_grad=True), torch.randn(10, 17)

    def pack(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        frozen_linear(x, weight)
    assert [value.data_ptr() for value in saved] == [weight.data_ptr()]


def test_a_weight_that_trains(library, calls):
    x = torch.randn(16, 17)
    weight, bias = torch.randn(10, 17), torch.randn(10, requires_grad=True)
    frozen_linear(x, weight.requires_grad_(), bias).sum().backward()
    close(weight.grad, torch.ones(10, 16) @ x)
    assert bias.grad.tolist() == [16.0] * 10
    assert calls == []


def test_autocast(library):
    x, weight = torch.randn(16, 17, requires_grad=True), torch.randn(10, 17)
    with torch.autocast("cpu", torch.bfloat16):
        output = frozen_linear(x, weight)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("case", ["float64", "few rows", "switched off", "another class", "meta"])
def test_what_torch_multiplies(monkeypatch, calls, case):
    monkeypatch.setattr(MODULE, "onednn_is_faster", lambda: True)
    x, weight = torch.randn(16, 17), torch.randn(10, 17)
    product(x, weight)
    if case == "float64":
        product(x.double(), weight.double())
    elif case == "few rows":
        product(x[:7], weight)
    elif case == "switched off":
        with torchs_products():
            product(x, weight)
    elif case == "another class":
        product(x, weight.as_subclass(type("Other", (Tensor,), {})))
    else:
        assert product(x.to("meta"), weight.to("meta")).shape == (16, 10)
    assert calls == ["onednn", "torch"]


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.ones(16, 17), torch.ones(10, 16), None),
        (torch.ones(16, 17), torch.ones(10, 17), torch.ones(9)),
        (torch.ones(16, 17), torch.ones(10, 17, dtype=torch.float64), None),
    ],
    ids=["features", "bias", "dtype"],
)
def test_bad_input_raises_as_torchs_linear(library, x, weight, bias):
    with pytest.raises(RuntimeError) as wanted:
        F.linear(x, weight, bias)
    with pytest.raises(RuntimeError) as got:
        frozen_linear(x, weight, bias)
    assert str(got.value) == str(wanted.value)


def test_compiles_as_one_graph(library):
    x, weight = torch.randn(16, 17, requires_grad=True), torch.randn(10, 17)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: frozen_linear(x, weight).sin(), fullgraph=True)
    output = compiled(x)
    close(output, F.linear(x, weight).sin())
    output.sum().backward()
    (wanted,) = torch.autograd.grad(F.linear(x, weight).sin().sum(), x)
    close(x.grad, wanted)


CONFIGS = {
    "scale_shift": ScaleShiftConfig(target_modules=["0"]),
    "block_lora": BlockLoRAConfig(rank=2, blocks=1, target_modules=["0"]),
    "sparse": SparseConfig(Magnitude(), density=0.2, target_modules=["0"]),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layers_that_attach_leaves_alone(library, calls, config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(17, 10), nn.Linear(10, 6), nn.Embedding(4, 6))
    base, keys = copy.deepcopy(model), list(model.state_dict())
    attach(model, config)
    head, x = model[1], torch.randn(16, 10)
    assert isinstance(head, FrozenLinear) and isinstance(head, nn.Linear)
    close(head(x), base[1](x))
    assert calls[-1] == library
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    close(copied[1](x), base[1](x))
    head.requires_grad_(True)
    head(x).sum().backward()
    close(head.weight.grad, torch.ones(6, 16) @ x)
    with disable_adapter(model):
        assert type(model[1]) is nn.Linear
    assert isinstance(model[1], FrozenLinear)
    detach(model)
    assert type(model[1]) is nn.Linear and list(model.state_dict()) == keys
    merge(attach(model, config))
    assert type(model[1]) is nn.Linear


def test_only_where_it_was_measured(monkeypatch):
    core = _native.require()
    expected = core.cpu_is_amd() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    MODULE.onednn_is_faster.cache_clear()
    assert MODULE.onednn_is_faster() == (expected and torch.backends.mkl.is_available())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    MODULE.onednn_is_faster.cache_clear()
    assert not MODULE.onednn_is_faster()
    MODULE.onednn_is_faster.cache_clear()
