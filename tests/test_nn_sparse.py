"""Sparse layers: outputs and gradients beside dense ones, and what else autograd asks of them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nn_models import inputs_of, output_of, saved_bytes, torchs_products, transformers_model
from partune import ops
from partune.nn import (
    SparseConfig,
    SparseLinear,
    attach,
    detach,
    trainable_parameters,
    write_back_,
)
from partune.ops import gather_csr, scatter_csr_, topk_csr
from partune.ops.sparse_linear import sparse_linear
from partune.selection import Magnitude, PrincipalWeights
from sparse_layers import (
    Scattered,
    assert_written,
    mask_of,
    selected,
    sparse,
    sparse_layers,
    two_layers,
    values_of,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def assert_close(got, wanted, tolerance, what=""):
    got, wanted = got.detach().double(), wanted.detach().double()
    assert got.shape == wanted.shape, what
    error, size = float((got - wanted).abs().max()), float(wanted.abs().max())
    assert error <= tolerance * size, f"{what}: {error:g}, largest {size:g}"


# ---- parameters ----


def test_what_trains():
    model = two_layers()
    keys = list(model.state_dict())
    attach(model, SparseConfig(PrincipalWeights(4), density=0.25))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == ["0.sparse.default.values", "2.sparse.default.values"]
    assert trainable_parameters(model)[0] == 24 * 33 // 4 + 33 * 10 // 4
    assert [key for key in model.state_dict() if "sparse" not in key] == keys
    assert all(isinstance(layer, nn.Linear) for layer in sparse_layers(model))
    for layer in sparse_layers(model):
        assert layer.adapter.values.dtype == torch.float32
        assert layer.adapter.values.equal(selected(layer.weight, layer.adapter))


def test_budget_rank():
    model = two_layers()
    attach(model, SparseConfig(Magnitude(), density=None, budget_rank=2))
    assert [v.numel() for v in values_of(model)] == [2 * (24 + 33), 2 * (33 + 10)]
    whole = SparseLinear(4, 3, selection=Magnitude(), density=None, budget_rank=100)
    assert whole.adapter.values.numel() == 12


def test_a_layer_by_itself():
    linear = nn.Linear(24, 10)
    x = torch.randn(5, 24)
    wanted = linear(x)
    layer = SparseLinear.from_linear(linear, selection=Magnitude(), density=0.1)
    assert torch.equal(layer(x), wanted) and layer.bias is linear.bias
    optimizer = torch.optim.SGD([layer.adapter.values], lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    plain = layer.to_linear()
    assert type(plain) is nn.Linear and not torch.equal(plain(x), wanted)
    assert torch.equal(plain(x), layer(x)) and plain.weight is not layer.weight
    fresh = SparseLinear(24, 10, bias=False, selection=Scattered(), density=0.1)
    assert fresh(x).shape == (5, 10) and fresh.adapter.values.numel() == 24


# ---- forward and gradients ----


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)])
def test_gradients_are_those_of_a_dense_layer(dtype, shape):
    torch.manual_seed(0)
    dense = nn.Linear(24, 33).to(dtype)
    layer = copy.deepcopy(dense)
    layer = SparseLinear.from_linear(layer, selection=Scattered(), density=0.2)
    layer.bias.requires_grad_(True)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [dense(inputs[0]), layer(inputs[1])]
    assert torch.equal(*outputs), "bit for bit"
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    tolerance = TOLERANCE[dtype]
    if 0 in shape:
        assert not layer.adapter.values.grad.any()
        return
    assert_close(inputs[1].grad, inputs[0].grad, tolerance, "input")
    assert_close(layer.bias.grad, dense.bias.grad, tolerance, "bias")
    wanted = selected(dense.weight.grad, layer.adapter)
    assert_close(layer.adapter.values.grad, wanted, tolerance, "values")
    assert layer.weight.grad is None


def assert_same_output(model, dense, inputs):
    """Bit for bit with torch's own products, and to rounding with the faster ones."""
    assert_close(output_of(model, inputs), output_of(dense, inputs), 1e-6, "output")
    with torchs_products():
        assert torch.equal(output_of(model, inputs), output_of(dense, inputs))


def test_gpt2_and_its_conv1d():
    torch.manual_seed(0)
    dense, inputs = transformers_model("gpt2"), inputs_of("gpt2")
    model = copy.deepcopy(dense)
    attach(model, SparseConfig(Scattered(), density=0.2))
    assert len(sparse_layers(model)) == 8
    assert_same_output(model, dense, inputs)
    wanted = output_of(dense, inputs)
    output_of(model, inputs).square().sum().backward()
    wanted.square().sum().backward()
    for name, module in model.named_modules():
        if module in sparse_layers(model):
            grad = dense.get_submodule(name).weight.grad
            wanted = selected(grad, module.adapter)
            assert_close(module.adapter.values.grad, wanted, 1e-5, name)


@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_models(kind):
    torch.manual_seed(0)
    dense, inputs = transformers_model(kind), inputs_of(kind)
    model = copy.deepcopy(dense)
    attach(model, SparseConfig(PrincipalWeights(2), density=0.3, modules_to_save=()))
    assert_same_output(model, dense, inputs)
    for each in (model, dense):
        output_of(each, inputs).square().sum().backward()
    for name, module in model.named_modules():
        if module in sparse_layers(model):
            grad = dense.get_submodule(name).weight.grad
            if grad is not None:  # bert's pooler isn't asked
                assert_close(module.adapter.values.grad, selected(grad, module.adapter), 1e-4, name)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(transposed):
    torch.manual_seed(0)
    weight = torch.randn((6, 5) if transposed else (5, 6), dtype=torch.float64)
    crow, col = topk_csr(torch.rand(weight.shape), 9)
    values = gather_csr(weight, crow, col).requires_grad_()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def run(x, bias, values):
        written = weight.clone()
        scatter_csr_([written], [values.detach()], [crow], [col])
        return sparse_linear(x, written, bias, values, crow, col, transposed=transposed)

    assert torch.autograd.gradcheck(run, (x, bias, values))


def test_no_second_derivative():
    layer = SparseLinear(6, 5, selection=Magnitude(), density=0.5)
    x = torch.randn(3, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


def test_a_weight_used_twice_in_a_graph():
    torch.manual_seed(0)
    dense = nn.Linear(12, 12).double()
    layer = SparseLinear.from_linear(copy.deepcopy(dense), selection=Scattered(), density=0.3)
    x = torch.randn(4, 12, dtype=torch.float64)
    for each in (dense, layer):
        each(each(x).tanh()).square().sum().backward()
    wanted = selected(dense.weight.grad, layer.adapter)
    assert_close(layer.adapter.values.grad, wanted, 1e-12)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_tied_weights():
    torch.manual_seed(0)
    dense = Tied()
    base = copy.deepcopy(dense.state_dict())
    model = sparse(copy.deepcopy(dense))
    assert model.first.adapter is model.second.adapter
    assert model.first.weight is model.second.weight
    assert len(list(p for p in model.parameters() if p.requires_grad)) == 1
    x = torch.randn(4, 12)
    for each in (dense, model):
        each(x).square().sum().backward()
    wanted = selected(dense.first.weight.grad, model.first.adapter)
    assert_close(model.first.adapter.values.grad, wanted, 1e-5)
    torch.optim.AdamW(values_of(model)[:1], lr=0.1).step()
    assert_written(model)
    copied = copy.deepcopy(model)
    assert copied.first.adapter is copied.second.adapter
    detach(model)
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


def test_two_backwards_and_accumulation():
    torch.manual_seed(0)
    model = sparse(two_layers(torch.float64))
    x = torch.randn(6, 24, dtype=torch.float64)
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    first = [v.grad.clone() for v in values_of(model)]
    loss.backward()
    for value, grad in zip(values_of(model), first, strict=True):
        assert_close(value.grad, 2 * grad, 1e-12)
    model.zero_grad()
    for part in x.split(2):
        model(part).square().sum().backward()
    for value, grad in zip(values_of(model), first, strict=True):
        assert_close(value.grad, grad, 1e-12, "in three parts")


def test_a_backward_made_stale_by_a_step_raises():
    model = sparse(two_layers())
    optimizer = torch.optim.SGD(values_of(model), lr=0.1)
    x = torch.randn(6, 24)
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    torch.manual_seed(0)
    model = sparse(two_layers())
    x = torch.randn(6, 24, requires_grad=True)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([v.grad for v in values_of(model)])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_compiled_whole():
    torch.manual_seed(0)
    model = sparse(two_layers())
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(6, 24)
    optimizer = torch.optim.AdamW(values_of(model), lr=0.01)
    for _ in range(3):
        grads = []
        for run in (model, compiled):
            model.zero_grad()
            output = run(x)
            output.square().sum().backward()
            grads.append([v.grad for v in values_of(model)])
        for pair in zip(*grads, strict=True):
            assert_close(*pair, 1e-5)
        optimizer.step()
    assert_written(model)
    assert_close(compiled(x), model(x), 1e-6, "with the last step's weights")


def test_autocast():
    torch.manual_seed(0)
    model = sparse(two_layers())
    x = torch.randn(6, 24)
    exact = model(x)
    exact.sum().backward()
    grads = [v.grad for v in values_of(model)]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    assert_close(output, exact, 2e-2)
    output.float().sum().backward()
    for value, grad in zip(values_of(model), grads, strict=True):
        assert value.grad.dtype == torch.float32
        assert_close(value.grad, grad, 2e-2)


def test_forward_and_backward_write_nothing():
    model = sparse(two_layers())
    before = copy.deepcopy(model.state_dict())
    versions = [p._version for p in model.parameters()]
    x = torch.randn(6, 24)
    wanted = model(x)
    wanted.sum().backward()
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
    with torch.inference_mode():
        assert torch.equal(model(x), wanted)
    assert [p._version for p in model.parameters()] == versions
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_saved_for_the_backward():
    model = sparse(two_layers())
    x = torch.randn(100, 24, requires_grad=True)
    whole = saved_bytes(model, lambda: model(x))
    indices = sum(t.nbytes for layer in sparse_layers(model) for t in layer.adapter.csr)
    # the two inputs and GELU's, which is the first layer's output
    assert whole == indices + 4 * 100 * (24 + 33 + 33)
    for value in values_of(model):
        value.requires_grad_(False)
    less = saved_bytes(model, lambda: model(x))
    assert less == indices + 4 * 100 * 33, "no input where no value trains"


# ---- copies and moves ----


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_train_by_themselves(how):
    model = sparse(two_layers())
    made = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    x = torch.randn(6, 24)
    wanted = model(x)
    assert torch.equal(made(x), wanted)
    optimizer = torch.optim.SGD(values_of(made), lr=0.1)
    made(x).square().sum().backward()
    optimizer.step()
    assert_written(made)
    assert torch.equal(model(x), wanted) and not torch.equal(made(x), wanted)


def test_moving_to_another_dtype():
    model = sparse(two_layers())
    model.double()
    assert values_of(model)[0].dtype == torch.float64
    assert sparse_layers(model)[0].adapter.original.dtype == torch.float64
    assert sparse_layers(model)[0].adapter.col_indices.dtype == torch.int32
    model(torch.randn(6, 24, dtype=torch.float64)).sum().backward()
    torch.optim.SGD(values_of(model), lr=0.1).step()
    assert_written(model)


def test_what_the_weight_held_may_have_another_dtype():
    """As files have it that were saved beside a model of another dtype."""
    layer = SparseLinear(24, 33, selection=Magnitude(), density=0.2)
    before = layer.weight.detach().clone()
    entries = layer.adapter
    with torch.no_grad():
        entries.values.zero_()
    write_back_(layer)
    for dtype in (torch.bfloat16, torch.float64):
        entries.original = before[mask_of(entries)].to(dtype)
        entries.take_out_(layer.weight)
        wanted = torch.where(mask_of(entries), before.to(dtype).float(), before)
        assert torch.equal(layer.weight, wanted)
        entries.put_in_(layer.weight)
        assert (layer.weight[mask_of(entries)] == 0).all()


@pytest.fixture
def calls(monkeypatch):
    """Of how many matrices each call of scatter_csr_ is."""
    counts, scatter = [], ops.scatter_csr_

    def counted(matrices, *rest):
        counts.append(len(matrices))
        scatter(matrices, *rest)

    monkeypatch.setattr(ops, "scatter_csr_", counted)
    return counts


def test_a_step_writes_all_layers_by_one_call(calls):
    model = nn.ModuleList(
        [sparse(two_layers()), sparse(two_layers(torch.bfloat16)), sparse(Tied())]
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    calls.clear()
    for values in trained:
        values.grad = torch.ones_like(values)
    torch.optim.SGD(trained, lr=0.1).step()
    assert calls == [5], "tied weights count once"
    assert_written(model)
    with torch.no_grad():
        for values in trained:
            values.sub_(1.0)
    write_back_(model)
    assert calls == [5, 5]
    assert_written(model)


def test_of_two_layers_with_one_weight_the_later_is_written_last(calls):
    linear = nn.Linear(24, 33)
    layers = [
        SparseLinear.from_linear(linear, selection=Magnitude(), density=0.5) for _ in range(2)
    ]
    values = [layer.adapter.values for layer in layers]
    for order in ([0, 1], [1, 0]):
        optimizer = torch.optim.SGD([values[i] for i in order], lr=1.0)
        for value, grad in zip(values, (1.0, 2.0), strict=True):
            value.grad = torch.full_like(value, grad)
        calls.clear()
        optimizer.step()
        assert calls == [1, 1]
        last = layers[order[-1]]
        held = selected(linear.weight, last.adapter)
        assert torch.equal(held, last.adapter.values)


def test_values_changed_by_hand():
    model = sparse(two_layers())
    x = torch.randn(6, 24)
    with torch.no_grad():
        values_of(model)[0].add_(1.0)
    with pytest.raises(RuntimeError, match=r"call partune.nn.write_back_\(model\) after whatever"):
        model(x)
    write_back_(model)
    model(x)
    assert_written(model)
    assert int(mask_of(sparse_layers(model)[0].adapter).sum()) == 24 * 33 // 5


def test_values_put_in_by_others():
    model = sparse(two_layers())
    values = {"0.sparse.default.values": torch.zeros(24 * 33 // 5)}
    with pytest.raises(RuntimeError, match="values: got a parameter that replaced the layer's own"):
        torch.func.functional_call(model, values, torch.randn(6, 24))
