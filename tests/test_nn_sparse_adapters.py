"""Sparse adapters of a model by name: switching, taking off, merging, saving and loading."""

import copy
import json

import pytest
import torch
from torch import nn

from nn_models import inputs_of, output_of, transformers_model
from partune.nn import (
    BlockLoRAConfig,
    SparseConfig,
    attach,
    detach,
    disable_adapter,
    fingerprint,
    load_adapter,
    merge,
    refresh,
    save_adapter,
    set_adapter,
    unmerge,
)
from partune.selection import Magnitude, PrincipalWeights, Random, Scores, Selection
from sparse_layers import (
    Scattered,
    assert_written,
    sparse_layers,
    train,
    two_layers,
    values_of,
)

DTYPES = [torch.float32, torch.bfloat16]


def trained(model, *, refreshed, name="default", selection=None, lr=0.05):
    """The model with an adapter that has been trained, and refreshed in between."""
    attach(model, SparseConfig(selection or Magnitude(), density=0.2), name=name)
    optimizer = torch.optim.AdamW(values_of(model), lr=lr)
    train(model, optimizer, 3)
    if refreshed:
        assert refresh(model, optimizer) < 1.0
        train(model, optimizer, 3)
    return model


def same_bits(model, state):
    now = model.state_dict()
    assert now.keys() == state.keys()
    return all(torch.equal(value, state[key]) for key, value in now.items())


@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_detach_gives_the_original_back(dtype, refreshed):
    model = two_layers(dtype)
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    trained(model, refreshed=refreshed)
    assert not torch.equal(model[0].weight, state["0.weight"])
    detach(model)
    assert same_bits(model, state)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert [p.requires_grad for p in model.parameters()] == flags


def test_detach_restores_what_no_number_equals():
    model = two_layers()
    with torch.no_grad():
        model[0].weight[0, :4] = torch.tensor([0.0, -0.0, float("nan"), float("inf")])
    bits = model[0].weight.detach().clone().view(torch.int32)
    with pytest.warns(UserWarning, match="takes more memory than full fine-tuning"):
        attach(model, SparseConfig(Scattered(), density=1.0, target_modules=["0"]))
    assert torch.equal(model[0].weight.view(torch.int32), bits), "also while attached"
    detach(model)
    assert torch.equal(model[0].weight.view(torch.int32), bits)


@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_switching(dtype, refreshed):
    model = two_layers(dtype)
    x = torch.randn(5, 24).to(dtype)
    outputs = {None: model(x)}
    state = copy.deepcopy(model.state_dict())
    for name, seed in (("first", 1), ("second", 2)):
        selection = Magnitude() if name == "first" else Scattered(seed)
        trained(model, refreshed=refreshed and name == "first", name=name, selection=selection)
        outputs[name] = model(x)
    attach(model, BlockLoRAConfig(rank=2, blocks=1), name="third")
    nn.init.normal_(model[0].adapter.up)
    outputs["third"] = model(x)
    assert len({output.sum().item() for output in outputs.values()}) == 4
    for name in ("first", "third", "second", None, "second", "first", None, "third"):
        set_adapter(model, name)
        assert torch.equal(model(x), outputs[name]), name
        names = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
        assert names == ({name} if name else set())
    set_adapter(model, "first")
    with disable_adapter(model):
        assert torch.equal(model(x), outputs[None])
    assert torch.equal(model(x), outputs["first"])
    detach(model, "first")
    set_adapter(model, "second")
    assert torch.equal(model(x), outputs["second"])
    detach(model)
    assert same_bits(model, state)


def test_an_inactive_adapter_is_not_written():
    model = trained(two_layers(), refreshed=False)
    optimizer = torch.optim.SGD(values_of(model), lr=0.1)
    values = values_of(model)
    set_adapter(model, None)
    before = model[0].weight.detach().clone()
    for value in values:
        value.grad = torch.ones_like(value)
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    set_adapter(model, "default")
    assert_written(model)


def test_training_goes_on_after_switching():
    models = [trained(two_layers(), refreshed=False) for _ in range(2)]
    for model, switches in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(values_of(model), lr=0.1)
        for _ in range(2):
            train(model, optimizer, 2)
            if switches:
                set_adapter(model, None)
                set_adapter(model, "default")
    assert torch.equal(models[0][0].weight, models[1][0].weight)


# ---- merging ----


@pytest.mark.parametrize("keep", [None, "adapter", "original"])
@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_unmerge(dtype, refreshed, keep):
    model = two_layers(dtype)
    state = copy.deepcopy(model.state_dict())
    trained(model, refreshed=refreshed)
    x = torch.randn(5, 24).to(dtype)
    wanted = model(x)
    values = values_of(model)
    report = merge(model, x, keep=keep)
    assert report.layers == 2 and report.largest_drift == 0.0 and report.biases == ()
    assert type(model[0]) is nn.Linear and model.state_dict().keys() == state.keys()
    assert torch.equal(model(x), wanted)
    weight = model[0].weight.detach().clone()
    kept = values[0].detach().clone()
    values[0].grad = torch.ones_like(values[0])
    torch.optim.SGD(values, lr=0.1).step()
    assert torch.equal(model[0].weight, weight), "the values have nothing to do with it any more"
    if keep is None:
        attach(model, SparseConfig(Magnitude()))
        detach(model)
        assert torch.equal(model[0].weight, weight)
        return
    with torch.no_grad():
        values[0].copy_(kept)
    assert unmerge(model, x).largest_drift == 0.0
    assert torch.equal(model(x), wanted)
    optimizer = torch.optim.SGD(values_of(model), lr=0.01)
    train(model, optimizer, 2)
    assert_written(model)
    detach(model)
    assert same_bits(model, state)


def test_merge_of_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    model = attach(Tied(), SparseConfig(Magnitude(), density=0.3))
    model(torch.randn(3, 8)).sum().backward()
    torch.optim.SGD([model.first.adapter.values], lr=0.1).step()
    x = torch.randn(3, 8)
    wanted = model(x)
    merge(model)
    assert torch.equal(model(x), wanted) and model.first.weight is model.second.weight


def test_a_head_is_trained_whole():
    torch.manual_seed(0)
    model, inputs = transformers_model("vit"), inputs_of("vit")
    state = copy.deepcopy(model.state_dict())
    attach(model, SparseConfig(PrincipalWeights(2), density=0.3))
    names = {n for n, p in model.named_parameters() if p.requires_grad and "values" not in n}
    assert names == {"classifier.trained.default.weight", "classifier.trained.default.bias"}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    output_of(model, inputs).square().sum().backward()
    optimizer.step()
    wanted = output_of(model, inputs)
    merge(model, keep="original")
    assert torch.equal(output_of(model, inputs), wanted)
    unmerge(model)
    assert torch.equal(output_of(model, inputs), wanted)
    detach(model)
    assert same_bits(model, state)


# ---- files ----


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load(dtype, refreshed, active, tmp_path):
    base = two_layers(dtype)
    state = copy.deepcopy(base.state_dict())
    model = trained(copy.deepcopy(base), refreshed=refreshed)
    x = torch.randn(5, 24).to(dtype)
    wanted, weight = model(x), model[0].weight.detach().clone()
    if not active:
        set_adapter(model, None)
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "a.safetensors"
    save_adapter(model, path, name="default")
    assert same_bits(model, before)
    load_adapter(base, path, name="other")
    assert torch.equal(base(x), wanted) and torch.equal(base[0].weight, weight)
    set_adapter(model, "default")
    for old, new in zip(sparse_layers(model), sparse_layers(base), strict=True):
        assert torch.equal(old.adapter.values, new.adapter.values)
        assert all(
            torch.equal(*pair) for pair in zip(old.adapter.csr, new.adapter.csr, strict=True)
        )
        assert new.adapter.selection == Magnitude()
    optimizer = torch.optim.AdamW(values_of(base), lr=0.05)
    train(base, optimizer, 3)
    refresh(base, optimizer)
    train(base, optimizer, 3)
    assert_written(base)
    detach(base)
    assert same_bits(base, state)


def test_a_file_is_small(tmp_path):
    model = trained(two_layers(), refreshed=False)
    save_adapter(model, tmp_path / "a.safetensors")
    import safetensors.torch

    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    parts = {name.partition(".")[2] for name in tensors}
    assert parts == {"values", "crow_indices", "col_indices"}


def test_loading_asks_no_selection(tmp_path):
    """A file has the entries; the principal weights needn't be found again."""

    class Diagonal(Selection):
        def propose(self, weight, grad, state):
            return Scores(torch.eye(*weight.shape))

    path = tmp_path / "a.safetensors"
    model = trained(two_layers(), refreshed=False, selection=Diagonal())
    save_adapter(model, path)
    loaded = load_adapter(two_layers(), path)
    x = torch.randn(5, 24)
    assert torch.equal(loaded(x), model(x))
    optimizer = torch.optim.SGD(values_of(loaded), lr=0.1)
    with pytest.raises(ValueError, match=r"was selected by .*Diagonal, which partune can't make"):
        refresh(loaded, optimizer)
    refresh(loaded, optimizer, selection=Diagonal())


@pytest.mark.parametrize("selection", [PrincipalWeights(3), Magnitude(largest=False), Random(7)])
def test_configs_as_json(selection):
    for options in (dict(density=0.3), dict(density=None, budget_rank=4)):
        config = SparseConfig(selection, target_modules=["q_proj"], modules_to_save=(), **options)
        again = SparseConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again.selection == selection and again.to_dict() == {
            **config.to_dict(), "modules_to_save": [],
        }  # fmt: skip


def test_the_fingerprint_is_the_base_s():
    model = two_layers()
    base = fingerprint(model)
    trained(model, refreshed=True)
    assert fingerprint(model) == base
    detach(model)
    assert fingerprint(model) == base


# ---- state_dict ----


@pytest.mark.parametrize("refreshed", [False, True])
def test_state_dict_resumes(refreshed):
    model = trained(two_layers(), refreshed=refreshed)
    optimizer = torch.optim.AdamW(values_of(model), lr=0.05)
    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again = attach(two_layers(), SparseConfig(Magnitude(), density=0.2))
    base = detach(copy.deepcopy(again)).state_dict()
    resumed = torch.optim.AdamW(values_of(again), lr=0.05)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for each, its_optimizer in ((model, optimizer), (again, resumed)):
        train(each, its_optimizer, 2)
        refresh(each, its_optimizer)
        train(each, its_optimizer, 2)
    assert same_bits(again, model.state_dict())
    assert same_bits(detach(again), base)
