"""Sparse layers, given what can't be: one sentence each, and nothing is changed."""

import copy
import json
import re

import pytest
import torch
from torch import nn

from nn_models import VisionTransformer, transformers_model
from partune.nn import (
    Refresher,
    SparseConfig,
    SparseLinear,
    attach,
    detach,
    load_adapter,
    mixed_adapters,
    refresh,
    save_adapter,
    set_adapter,
    write_back_,
)
from partune.ops.sparse_linear import sparse_linear
from partune.selection import GradientMagnitude, Magnitude, Movement, PrincipalWeights
from sparse_layers import Scattered, sparse, two_layers, values_of
from test_bad_input_adapters import unchanged
from test_bad_input_block_lora import Scaled

OPTIONS = [
    (dict(density=0.0), ValueError, r"density: got 0\.0, want 0 < density <= 1"),
    (dict(density=1.5), ValueError, r"density: got 1\.5, want 0 < density <= 1"),
    (dict(density=None), ValueError, "density: got None, want 0 < density <= 1"),
    (dict(density=None, budget_rank=0), ValueError, "budget_rank: got 0, want an int of at least"),
    (dict(density=0.1, budget_rank=4), ValueError, "density, budget_rank: got both"),
    (dict(selection=Magnitude), TypeError, "selection: got <class .*Magnitude'>, want an object"),
    (dict(selection=None), TypeError, "selection: got None, want an object"),
    (dict(selection=Movement()), ValueError, "selection: got Movement, which selects by gradients"),
    (dict(selection=GradientMagnitude()), ValueError, "GradientMagnitude, which selects by grad"),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS, ids=range(len(OPTIONS)))
def test_bad_options(options, error, message):
    options = {"selection": Magnitude(), **options}
    for make in (
        lambda: SparseConfig(**options),
        lambda: SparseLinear(8, 8, **options),
        lambda: SparseLinear.from_linear(nn.Linear(8, 8), **options),
    ):
        with pytest.raises(error, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_names_as_a_string():
    with pytest.raises(TypeError, match="modules_to_save: got the string 'head'"):
        SparseConfig(modules_to_save="head")


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 4, 4))


class Reader(nn.Module):
    """An embedding and a projection with one weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.project = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.project.weight = self.embed.weight


def with_nan():
    model = two_layers()
    nn.init.constant_(model[2].weight, float("nan"))
    return model


def on_meta():
    return nn.Sequential(nn.Linear(8, 8, device="meta"))


BAD = [
    (two_layers(), dict(target_modules=["q_proj"]), ValueError,
     r"target_modules: \['q_proj'\] matched no layer of Sequential, which has 0, 2"),
    (VisionTransformer(), dict(target_modules=["patch_embed.proj"]), TypeError,
     "patch_embed.proj is a Conv2d, want an nn.Linear, GPT-2's Conv1D or stacked experts"),
    (nn.Sequential(Experts()), dict(target_modules=["0"]), TypeError,
     "0 is a Experts, want .*transformers' experts interface.*SparseAdamW takes others"),
    (nn.Sequential(Scaled(4, 4)), dict(target_modules=["0"]), TypeError, "0 is a Scaled, want an"),
    (nn.Sequential(nn.ReLU()), {}, ValueError, "which has none for sparse training"),
    (Reader(), dict(target_modules=["project"]), ValueError,
     "the weight of project is embed's too, a Embedding outside of target_modules"),
    (with_nan(), dict(selection=PrincipalWeights(2)), ValueError,
     "2: weight: got NaN or infinite entries"),
    (on_meta(), {}, ValueError, "0: its weight is on the meta device; load the weights first"),
    (nn.Sequential(SparseLinear(4, 4, selection=Magnitude())), {}, ValueError,
     "0 has an adapter that was attached to another module than this Sequential"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "options", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_attach(model, options, error, message):
    classes = [type(module) for module in model.modules()]
    versions = [p._version for p in model.parameters()]
    with pytest.raises(error, match=message) as caught:
        attach(model, SparseConfig(**{"selection": Magnitude(), **options}))
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == classes
    assert [p._version for p in model.parameters()] == versions


def test_quantised_and_sharded_weights():
    from torchao import quantization

    model = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(TypeError, match=r"0: got a weight that is a Int8.*, want a strided one"):
        attach(model, SparseConfig(Magnitude()))
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(model[0].weight.to_sparse())
    with pytest.raises(TypeError, match=r"torch.float32, torch.sparse_coo, want a strided one"):
        attach(model, SparseConfig(Magnitude()))


@pytest.mark.parametrize("linear", [nn.Conv1d(4, 4, 1), Scaled(4, 4), 3], ids=str)
def test_no_linear_layer(linear):
    with pytest.raises(TypeError, match=f"linear: got {type(linear).__name__}, want an nn.Linear"):
        SparseLinear.from_linear(linear, selection=Magnitude())


@pytest.mark.parametrize(
    ("density", "message"),
    [(0.001, "0 and 1 more: no entries are selected"), (0.7, "0 and 1 more: a vector of so many")],
)
def test_budgets_that_do_no_good(density, message):
    with pytest.warns(UserWarning, match=message):
        attach(two_layers(), SparseConfig(Magnitude(), density=density))


def test_a_weight_that_trains():
    model = sparse(two_layers()).requires_grad_(True)
    with pytest.raises(ValueError, match="weight: got one that requires grad beside values"):
        model(torch.randn(2, 24))
    with pytest.raises(ValueError, match="weight: got one that requires grad beside values"):
        weight = torch.ones(2, 2, requires_grad=True)
        crow, col = torch.tensor([0, 1, 1]), torch.tensor([0], dtype=torch.int32)
        sparse_linear(torch.ones(2), weight, None, torch.ones(1), crow, col)


def test_mixing():
    model = sparse(two_layers())
    with (
        pytest.raises(ValueError, match="'default' is a SparseConfig's adapter, which can't"),
        mixed_adapters(model, ["default", None]),
    ):
        pass


# ---- refresh and write_back_ ----


class Refusing(Magnitude):
    def propose(self, weight, grad, state):
        if weight.shape[0] == 10:
            raise ValueError("weight: not this one")
        return super().propose(weight, grad, state)


class OfAnotherShape(Magnitude):
    def propose(self, weight, grad, state):
        return super().propose(weight.t().contiguous(), grad, state)


def test_bad_refreshes():
    model = sparse(two_layers())
    optimizer = torch.optim.AdamW(values_of(model), lr=0.1)
    model(torch.randn(4, 24)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict()["state"])

    def act():
        for bad, error, message in (
            (lambda: refresh(two_layers(), optimizer), ValueError, "without active sparse layers"),
            (lambda: refresh(model, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)),
             ValueError, "optimizer: got one without any of the model's values"),
            (lambda: refresh(model, optimizer, selection=Movement()), ValueError, "by gradients"),
            (lambda: refresh(model, optimizer, selection=3), TypeError, "selection: got 3, want"),
            (lambda: refresh(model, optimizer, selection=Refusing()), ValueError, "not this one"),
            (lambda: refresh(model, optimizer, selection=OfAnotherShape()), ValueError,
             r"OfAnotherShape proposed scores of shape \(24, 33\) for a matrix of \(33, 24\)"),
        ):  # fmt: skip
            with pytest.raises(error, match=message):
                bad()

    unchanged(model, act)
    for old, new in zip(saved.values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert all(layer.adapter.selection == Scattered() for layer in (model[0], model[2]))


def test_quantised_state():
    model = sparse(two_layers())
    optimizer = torch.optim.SGD(values_of(model), lr=0.1)
    optimizer.state[values_of(model)[1]]["state1"] = torch.zeros(66, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"optimizer: its state1 is torch.uint8, which can't be"):
        refresh(model, optimizer)


def test_nothing_to_write():
    for model in (two_layers(), detach(sparse(two_layers()))):
        with pytest.raises(ValueError, match="got a Sequential without active sparse layers; att"):
            write_back_(model)
    model = sparse(two_layers())
    set_adapter(model, None)
    with pytest.raises(ValueError, match="set_adapter activates them"):
        write_back_(model)


@pytest.mark.parametrize("interval", [0, -1, 2.5, True, None])
def test_bad_intervals(interval):
    from partune.integrations.transformers import RefreshCallback

    model = sparse(two_layers())
    optimizer = torch.optim.SGD(values_of(model), lr=0.1)
    for make in (lambda: Refresher(model, optimizer, interval), lambda: RefreshCallback(interval)):
        with pytest.raises(ValueError, match=re.escape(f"interval: got {interval!r}, want a numb")):
            make()


# ---- files and state_dicts ----


def edited(path, edit_tensors=lambda tensors: None, **options):
    import safetensors.torch

    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), **options})
    tensors = safetensors.torch.load_file(path)
    edit_tensors(tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def change(key, function):
    def edit(tensors):
        tensors[key] = function(tensors[key])

    return edit


FILES = [
    (change("0.col_indices", lambda col: col + 24), {}, r"0, col_indices: got columns from"),
    (change("0.col_indices", lambda col: col.flip(0)), {}, "0, col_indices: got unsorted"),
    (change("0.col_indices", lambda col: col.long()), {}, "0, col_indices: got dtype int64"),
    (change("0.crow_indices", lambda crow: crow[1:]), {}, r"0, crow_indices: got shape \(33,\)"),
    (change("2.values", lambda values: values.double()), {}, "2, values: got torch.float64, want"),
    (change("2.values", lambda values: values[1:]), {}, r"has 2.values of shape \(65,\), want"),
    (lambda tensors: tensors.pop("2.values"), {}, "fit the model: 2.values is in one alone"),
    (lambda tensors: None, dict(density=0.3), "0, col_indices: got 158 entries, want 237"),
    (lambda tensors: None, dict(density=7.0), r"is damaged: its config can't be read .density"),
    (lambda tensors: None, dict(selection={"type": "Random", "seed": "x"}), "is damaged: its con"),
    (lambda tensors: tensors.update({"0.touched_col_indices": torch.zeros(3).int()}), {},
     "0, touched: got one of touched_crow_indices and touched_col_indices, want both"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "options", "message"), FILES, ids=range(len(FILES)))
def test_wrong_files(edit, options, message, tmp_path):
    model, path = sparse(two_layers()), tmp_path / "a.safetensors"
    save_adapter(model, path)
    detach(model)
    edited(path, edit, **options)

    def act():
        with pytest.raises(ValueError, match=message) as caught:
            load_adapter(model, path)
        assert "\n" not in str(caught.value)

    unchanged(model, act)


def test_another_base(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(sparse(two_layers()), path)
    model = two_layers()
    nn.init.zeros_(model[0].bias)
    with pytest.raises(ValueError, match=r"another base: 1 tensors differ, the first is 0\.bias"):
        load_adapter(model, path)


def test_bad_state_dicts():
    model = sparse(two_layers())
    state = model.state_dict()
    inactive = copy.deepcopy(model)
    set_adapter(inactive, None)
    missing = {key: value for key, value in state.items() if not key.endswith("0.crow_indices")}
    missing.pop("0.sparse.default.crow_indices")
    wrong = {**state, "2.sparse.default.col_indices": state["2.sparse.default.col_indices"] + 33}
    short = {**state, "2.sparse.default.original": torch.zeros(3)}
    for bad, message in (
        (missing, r'Missing key.*"0.sparse.default.crow_indices"'),
        (wrong, "2.sparse.default: col_indices: got columns from"),
        (short, r"2.sparse.default: original: got shape \(3,\), want \(66,\)"),
        (inactive.state_dict(), "saved while the adapter was not active, and now it is"),
    ):
        with pytest.raises(RuntimeError, match=message):
            sparse(two_layers()).load_state_dict(bad)
    with pytest.raises(RuntimeError, match="saved while the adapter was active, and now not"):
        inactive.load_state_dict(state)


def test_conv1d_is_taken_by_name():
    model = transformers_model("gpt2")
    attach(model, SparseConfig(Magnitude(), target_modules=["c_attn"], density=0.5))
    assert [p.numel() for p in model.parameters() if p.requires_grad] == [96, 96]
