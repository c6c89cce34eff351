"""Adapters of a model by name: switching, taking off, saving and loading, copies of the model."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn

from nn_models import (
    OWN,
    ConvNet,
    VisionTransformer,
    disturbed,
    inputs_of,
    output_of,
    transformers_model,
)
from partune.nn import (
    ScaleShiftConfig,
    attach,
    detach,
    fingerprint,
    load_adapter,
    save_adapter,
    set_adapter,
    trainable_parameters,
)

KINDS = ["vit", "convnext", "clip", "llama", *OWN]


def model_and_output(kind):
    """A model, and what computes its output on some input."""
    torch.manual_seed(0)
    if kind in OWN:
        images = torch.randn(2, 3, 16, 16)
        return disturbed(OWN[kind]()), lambda model: model(images)
    inputs = inputs_of(kind)
    return transformers_model(kind), lambda model: output_of(model, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters(kind):
    model, run = model_and_output(kind)
    base = run(model)
    state = copy.deepcopy(model.state_dict())
    attach(model, ScaleShiftConfig(init_std=0.2), name="first")
    first = run(model)
    attach(
        model,
        ScaleShiftConfig(target_modules=r".*(conv1|fc1|v_proj|attn.proj|norm)", init_std=0.2),
        name="second",
    )
    second = run(model)
    counts = {}
    for name, wanted in {"first": first, None: base, "second": second}.items():
        set_adapter(model, name)
        assert torch.equal(run(model), wanted), "bit for bit"
        counts[name] = trainable_parameters(model)[0]
    assert not torch.equal(first, base) and not torch.equal(second, first)
    assert counts[None] == 0 and counts["first"] > counts["second"] > 0
    detach(model, "first")
    assert torch.equal(run(model), second), "the active one stays active"
    detach(model)
    assert torch.equal(run(model), base)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_one_adapter_leaves_base_and_others_alone():
    model, run = model_and_output("convnet")
    base = run(model)
    state = copy.deepcopy(model.state_dict())
    attach(model, ScaleShiftConfig(), name="other")
    other = run(model)
    attach(model, ScaleShiftConfig(), name="trained")
    start = run(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()  # BatchNorm's running statistics move, in the adapter
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model(torch.randn(8, 3, 16, 16)), torch.arange(8) % 3
        ).backward()
        optimizer.step()
    model.eval()
    assert not torch.allclose(run(model), start)
    set_adapter(model, "other")
    assert torch.equal(run(model), other)
    set_adapter(model, None)
    assert torch.equal(run(model), base)
    detach(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_detaching_while_disabled():
    model, run = model_and_output("timm-vit")
    attach(model, ScaleShiftConfig(), name="a")
    attach(model, ScaleShiftConfig(), name="b")
    set_adapter(model, None)
    detach(model, "a")
    assert type(model.blocks[0].mlp.fc1) is nn.Linear, "still disabled"
    set_adapter(model, "b")
    assert type(model.blocks[0].mlp.fc1) is not nn.Linear
    run(detach(model, "b"))
    with pytest.raises(ValueError, match="without adapters"):
        set_adapter(model, "b")


# ---- copies ----


@pytest.mark.parametrize("kind", ["vit", "convnext", "llama", "gemma", "convnet"])
def test_copies_and_pickles(kind):
    model, run = model_and_output(kind)
    base = run(model)
    attach(model, ScaleShiftConfig(), name="a")
    first = run(model)
    attach(model, ScaleShiftConfig())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert torch.equal(run(other), run(model))
        set_adapter(other, "a")
        assert torch.equal(run(other), first)
        detach(other)
        assert torch.equal(run(other), base)
    set_adapter(model, "a")
    assert torch.equal(run(model), first), "the copies had registries of their own"


def test_state_dict_round_trip():
    base, run = model_and_output("vit")
    model = attach(copy.deepcopy(base), ScaleShiftConfig())
    other = attach(base, ScaleShiftConfig())
    assert not torch.equal(run(other), run(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other), run(model))


# ---- the fingerprint ----


def test_fingerprint_tells_names_shapes_dtypes_and_bytes():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    first = fingerprint(model)
    assert set(first) == set(model.state_dict())
    assert fingerprint(copy.deepcopy(model)) == first
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight[3, 2] = torch.nextafter(changed[0].weight[3, 2], torch.tensor(9.0))
    assert {name for name in first if fingerprint(changed)[name] != first[name]} == {"0.weight"}
    assert set(fingerprint(copy.deepcopy(model).double()).items()).isdisjoint(
        {item for item in first.items() if "num_batches" not in item[0]}
    )
    zeros = {}
    for shape in ((2, 3), (3, 2), (6,)):
        module = nn.Module()
        module.weight = nn.Parameter(torch.zeros(shape))
        zeros[shape] = fingerprint(module)["weight"]
    assert len(set(zeros.values())) == 3
    transposed = nn.Linear(4, 4)
    same = nn.Linear(4, 4)
    same.bias = transposed.bias
    same.weight = nn.Parameter(transposed.weight.detach().t().contiguous().t())
    assert fingerprint(same) == fingerprint(transposed), "strides don't count"
    empty = nn.Linear(0, 3, bias=False)
    assert len(fingerprint(empty)["weight"]) == 64


def test_fingerprint_is_taken_at_attach():
    model = nn.Sequential(nn.Linear(4, 6))
    before = fingerprint(model)
    attach(model, ScaleShiftConfig())
    with torch.no_grad():
        model[0].weight.add_(1)
    assert fingerprint(model) == before
    detach(model)
    assert fingerprint(model) != before


# ---- files ----


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model, run = model_and_output(kind)
    base = copy.deepcopy(model)
    attach(model, ScaleShiftConfig(init_std=0.3))
    path = tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size < 200_000
    loaded = load_adapter(copy.deepcopy(base), path, name="from_file")
    assert torch.equal(run(loaded), run(model))
    assert trainable_parameters(loaded) == trainable_parameters(model)
    set_adapter(loaded, None)
    assert torch.equal(run(loaded), run(base))
    # beside another, and a head that was drawn anew, as from_pretrained does
    heads = [m for n, m in base.named_modules() if n in ("classifier", "head", "head.fc", "fc")]
    for head in heads:
        nn.init.normal_(head.weight if hasattr(head, "weight") else head.fc.weight)
    load_adapter(attach(base, ScaleShiftConfig()), path, name="from_file")
    assert torch.equal(run(base), run(model))


def test_the_running_statistics_are_saved(tmp_path):
    model, run = model_and_output("convnet")
    base = copy.deepcopy(model)
    attach(model, ScaleShiftConfig()).train()
    for _ in range(3):
        model(torch.randn(8, 3, 16, 16) + 1)
    model.eval()
    save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(run(load_adapter(base, tmp_path / "a.safetensors")), run(model))


def other_weights(model):
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[0, 0] += 1
    return model


def other_dtype(model):
    return model.bfloat16()


def missing_bias(model):
    model.norm.bias = None
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "another base: 1 tensors differ, the first is blocks.1.attn.qkv.weight"),
        (other_dtype, "another base: .* in the same dtype"),
        (missing_bias, "another base: 1 tensors differ, the first is norm.bias"),
        (lambda model: ConvNet(), "matched no layer of ConvNet|another base"),
        (lambda model: attach(model, ScaleShiftConfig()), "'default' is attached already"),
    ],
)
def test_another_base_is_refused(change, message, tmp_path):
    base = VisionTransformer()
    path = tmp_path / "a.safetensors"
    save_adapter(attach(copy.deepcopy(base), ScaleShiftConfig()), path)
    refused_unchanged(change(base), path, message)


def refused_unchanged(model, path, message):
    classes = [type(module) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, path)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def rewrite(path, change):
    """Save a file again with other tensors or metadata."""
    import safetensors.torch

    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)


def edit_config(metadata, **options):
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("norm.scale"), "doesn't fit the model: norm.scale is in one alone"),
        (lambda t, m: t.update(extra=torch.ones(1)), "doesn't fit the model: extra is in one"),
        (lambda t, m: t.update({"norm.scale": torch.ones(3)}),
         r"has norm.scale of shape \(3,\), want \(8,\)"),
        (lambda t, m: t.update({"norm.scale": torch.ones(8, dtype=torch.int32)}),
         "has norm.scale of torch.int32, want one like torch.float32"),
        (lambda t, m: m.clear(), "holds 'no adapter of partune'"),
        (lambda t, m: m.update(format="partune adapter, version 9"), "version 9' with method"),
        (lambda t, m: m.update(method="lora"), "with method 'lora', want .* with scale_shift"),
        (lambda t, m: m.update(config="{"), "its config can't be read"),
        (lambda t, m: edit_config(m, colour=1), "its config can't be read"),
        (lambda t, m: m.pop("fingerprint"), "its fingerprint can't be read"),
        (lambda t, m: edit_config(m, target_modules=["nose"]), "matched no layer"),
    ],
    ids=range(11),
)  # fmt: skip
def test_wrong_files(change, message, tmp_path):
    base = VisionTransformer()
    path = tmp_path / "a.safetensors"
    save_adapter(attach(copy.deepcopy(base), ScaleShiftConfig()), path)
    rewrite(path, change)
    refused_unchanged(base, path, message)


def test_files_that_are_none(tmp_path):
    model = VisionTransformer()
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors is no file"):
        load_adapter(model, path)
    adapted = attach(copy.deepcopy(model), ScaleShiftConfig())
    with pytest.raises(ValueError, match=r"path: got the folder .*, want a file, such as .*\.safe"):
        save_adapter(adapted, tmp_path)
    assert not list(tmp_path.iterdir())
    save_adapter(adapted, path)
    path.write_bytes(path.read_bytes()[:-7])
    refused_unchanged(model, path, "is no whole safetensors file")


def test_a_failed_save_leaves_the_file(tmp_path, monkeypatch):
    import safetensors.torch

    model = attach(VisionTransformer(), ScaleShiftConfig())
    path = tmp_path / "a.safetensors"
    save_adapter(model, path)
    before = path.read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_nothing_to_save(tmp_path):
    model = attach(VisionTransformer(), ScaleShiftConfig())
    set_adapter(model, None)
    with pytest.raises(ValueError, match="no adapter is active, want one of"):
        save_adapter(model, tmp_path / "a.safetensors")
    save_adapter(model, tmp_path / "a.safetensors", name="default")
    with pytest.raises(ValueError, match="without adapters"):
        save_adapter(nn.Linear(2, 2), tmp_path / "a.safetensors")
