"""Adapters of Block-LoRA by name: switching, merging, rows of a batch, files."""

import copy
import json

import pytest
import torch
import torch.distributed.fsdp
from torch import nn

from block_lora_layers import (
    KINDS,
    SMALL,
    PlainLayer,
    model_and_output,
    relative,
    trained,
)
from nn_models import OWN, inputs_of, output_of, transformers_model
from partune.nn import (
    BlockLoRAConfig,
    ScaleShiftConfig,
    attach,
    detach,
    disable_adapter,
    load_adapter,
    merge,
    mixed_adapters,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- names, switching, taking off ----


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters(kind):
    model, run = model_and_output(kind)
    base, state = run(model), copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    outputs = {None: base}
    for name, config in {
        "first": BlockLoRAConfig(**SMALL),
        "second": BlockLoRAConfig(rank=2, blocks=1),
        "third": BlockLoRAConfig(rank=4, share="rank"),
        "other": ScaleShiftConfig(init_std=0.2),
    }.items():
        attach(model, config, name=name)
    trained(model)
    for name in ("first", "second", "third", "other"):
        set_adapter(model, name)
        outputs[name] = run(model)
    for name in ("first", None, "third", "other", "second"):
        set_adapter(model, name)
        assert torch.equal(run(model), outputs[name]), "bit for bit"
    set_adapter(model, "third")
    third = run(model)
    with disable_adapter(model):
        assert torch.equal(run(model), base)
        assert trainable_parameters(model)[0] == 0
    assert torch.equal(run(model), third), "bit for bit"
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names and all(".third." in name for name in names)
    detach(model, "first")
    assert torch.equal(run(model), third)
    detach(model)
    assert torch.equal(run(model), base)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_moves_the_factors_alone():
    model, run = model_and_output("timm-vit")
    base, state = run(model), copy.deepcopy(model.state_dict())
    attach(model, BlockLoRAConfig(**SMALL, dropout=0.1)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 3
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(run(detach(model.eval())), base)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_copies_of_a_model():
    model, run = model_and_output("gpt2")
    trained(attach(model, BlockLoRAConfig(**SMALL, parts={"c_attn": ("q",)})))
    other = copy.deepcopy(model)
    assert torch.equal(run(other), run(model))
    other.load_state_dict(attach(transformers_model("gpt2"), other_config()).state_dict())
    assert not torch.equal(run(other), run(model))


def other_config():
    return BlockLoRAConfig(**SMALL, parts={"c_attn": ("q",)})


def test_tied_weights_get_one_layers_factors_and_do_not_merge():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    base = copy.deepcopy(model)
    trained(attach(model, BlockLoRAConfig(target_modules=["2"])))
    x = torch.randn(5, 4)
    assert torch.equal(model[:2](x), base[:2](x))
    assert model[2].weight is model[0].weight
    plain = PlainLayer(base[2], copy.deepcopy(model[2].adapter), {})
    torch.testing.assert_close(model(x), plain(base[:2](x)))
    with pytest.raises(ValueError, match="2: its weight is shared with another module"):
        merge(model)


# ---- merging ----


@pytest.mark.parametrize("share", ["input", "rank"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_save_pretrained_and_reloaded(kind, share, tmp_path):
    model, run = model_and_output(kind)
    classes = [type(module) for module in model.modules()]
    keys, base = list(model.state_dict()), run(model)
    trained(attach(model, BlockLoRAConfig(**SMALL, share=share)))
    unmerged = run(model)
    report = merge(model)
    assert report.largest_drift is None and report.layers >= 8 and report.biases == ()
    assert relative(unmerged, base) > 1e-2, "the adapter does something"
    assert relative(run(model), unmerged) <= 1e-5
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    if kind not in OWN:
        model.save_pretrained(tmp_path)
        reloaded = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(run(reloaded), run(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", ["original", "adapter"])
def test_unmerged_again(keep, dtype):
    model, inputs = transformers_model("gpt2").to(dtype), inputs_of("gpt2")
    state = copy.deepcopy(model.state_dict())
    trained(attach(model, BlockLoRAConfig(**SMALL, parts={"c_attn": ("q", "v")}), name="a"), 0.05)
    unmerged = output_of(model, inputs)
    adapted_state = copy.deepcopy(model.state_dict())
    bar = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]  # of 8-bit weights, rounded anew
    assert 0 < merge(model, inputs, keep=keep).relative_drift <= bar
    assert list(model.state_dict()) == list(state), "what is kept is no part of the model's state"
    assert not torch.equal(model.transformer.h[0].attn.c_attn.weight,
                           state["transformer.h.0.attn.c_attn.weight"])  # fmt: skip
    other = copy.deepcopy(model)
    report = unmerge(model, inputs)
    assert report.layers == 8 and 0 < report.relative_drift <= bar
    again = model.state_dict()
    assert list(again) == list(adapted_state)
    for key, value in adapted_state.items():
        if keep == "original" or "block_lora" in key:
            assert torch.equal(again[key], value), key
        else:
            eps = torch.finfo(dtype).eps
            assert (again[key] - value).abs().max() <= 2 * eps * max(1, value.abs().max()), key
    if keep == "original":
        assert torch.equal(output_of(model, inputs), unmerged)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        key for key in again if ".block_lora.a." in key
    }  # fmt: skip
    unmerge(other)
    assert torch.equal(output_of(other, inputs), output_of(model, inputs)), "of a copy"


def test_a_head_and_ssf_come_back_too():
    for config in (BlockLoRAConfig(**SMALL), ScaleShiftConfig(init_std=0.2, shift=True)):
        model, run = model_and_output("timm-vit")
        model.blocks[0].attn.qkv.bias = None
        state = copy.deepcopy(model.state_dict())
        trained(attach(model, config))
        with torch.no_grad():
            model.head.adapter.weight.add_(1.0)
        unmerged = run(model)
        keeps = ["original", "adapter"] if isinstance(config, BlockLoRAConfig) else ["original"]
        for keep in keeps:
            created = merge(model, keep=keep).biases
            assert relative(run(model), unmerged) <= 1e-5
            assert created == unmerge(model).biases
            assert relative(run(model), unmerged) <= 1e-5
        detach(model)
        assert list(model.state_dict()) == list(state)
        for key, value in state.items():
            torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=1e-6)
        if keeps == ["original"]:
            assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_norms_weights_that_a_merge_made_are_taken_away():
    norm = nn.LayerNorm(8, elementwise_affine=False)
    model = attach(nn.Sequential(norm), ScaleShiftConfig(shift=True, init_std=0.2))
    x = torch.randn(3, 8)
    before = model(x)
    assert (
        merge(model, keep="original").biases == ("0.weight", "0.bias") and norm.weight is not None
    )
    assert norm.elementwise_affine and unmerge(model).biases == ("0.weight", "0.bias")
    assert torch.equal(model(x), before)
    detach(model)
    assert norm.weight is None and not norm.elementwise_affine and not model.state_dict()


@pytest.mark.parametrize("keep", ["original", "adapter"])
def test_a_model_that_moved_while_merged(keep):
    model = attach(nn.Sequential(nn.Linear(8, 8)), BlockLoRAConfig(**SMALL))
    merge(model, keep=keep)
    unmerge(model.to("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_flags_that_a_merge_sets_are_taken_back():
    model, inputs = transformers_model("llama"), inputs_of("llama")
    attach(model, ScaleShiftConfig(target_modules=["q_proj"], shift=True, init_std=0.2))
    unmerged, keys = output_of(model, inputs), list(model.state_dict())
    created = merge(model, keep="original").biases
    assert model.config.attention_bias and len(created) == 8
    assert set(unmerge(model).biases) == set(created)
    assert not model.config.attention_bias and list(model.state_dict()) == keys
    assert torch.equal(output_of(model, inputs), unmerged)


# ---- rows of a batch with adapters of their own ----


def with_three(kind):
    model, _ = model_and_output(kind)
    for name, config in {
        "a": BlockLoRAConfig(**SMALL),
        "b": BlockLoRAConfig(rank=2, share="rank", target_modules=r".*(fc1|qkv|c_attn|q_proj)"),
        "c": BlockLoRAConfig(rank=2, blocks=1, target_modules=r".*(attn\.proj|fc2|c_proj|o_proj)"),
    }.items():
        attach(model, config, name=name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".trained." in name:
                parameter.add_(torch.randn_like(parameter))
    return trained(model)


@pytest.mark.parametrize("kind", ["timm-vit", "llama", "gpt2"])
def test_rows_have_adapters_of_their_own(kind):
    model = with_three(kind)
    inputs = torch.randn(6, 3, 16, 16) if kind in OWN else torch.randint(3, 50, (6, 5))

    def run(rows):
        return model(inputs[rows]) if kind in OWN else model(inputs[rows]).logits

    names = ["b", None, "a", "c", "b", "a"]
    classes = [type(module) for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with mixed_adapters(model, names):
        mixed = run(slice(None))
        trained_now = {n.partition("block_lora.")[2][:1]
                       for n, p in model.named_parameters()
                       if p.requires_grad and "block_lora" in n}  # fmt: skip
        assert trained_now == {"a", "b", "c"}
    assert [type(module) for module in model.modules()] == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for row, name in enumerate(names):
        set_adapter(model, name)
        assert relative(mixed[row], run(slice(row, row + 1))[0]) <= 1e-5, (row, name)


def test_gradients_of_mixed_rows():
    model = with_three("timm-vit").double()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    names = ["a", "b", None, "a"]
    with mixed_adapters(model, names):
        model(images).square().sum().backward()
    mixed = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n in mixed if ".c." in n} == set()
    for name in ("a", "b"):
        model.zero_grad()
        set_adapter(model, name)
        rows = [row for row, n in enumerate(names) if n == name]
        model(images[rows]).square().sum().backward()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(mixed[key], parameter.grad, rtol=1e-7, atol=1e-10)


def test_one_adapter_or_none_in_all_rows():
    model = with_three("timm-vit")
    images = torch.randn(3, 3, 16, 16)
    set_adapter(model, "b")
    wanted = model(images)
    with mixed_adapters(model, ["b"] * 3):
        assert relative(model(images), wanted) <= 1e-5
    assert torch.equal(model(images), wanted)
    with disable_adapter(model):
        base = model(images)
        with mixed_adapters(model, [None] * 3):
            assert torch.equal(model(images), base)
        assert torch.equal(model(images), base), "still disabled"


def test_mixed_rows_compile():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    for name in ("a", "b"):
        attach(model, BlockLoRAConfig(**SMALL), name=name)
    trained(model)
    x = torch.randn(4, 8)
    with mixed_adapters(model, ["a", "b", None, "a"]):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))


# ---- files ----


@pytest.mark.parametrize(
    "config",
    [
        BlockLoRAConfig(**SMALL),
        BlockLoRAConfig(rank=4, share="rank", scaling="rslora", alpha=3.0, dropout=0.1),
        BlockLoRAConfig(
            **SMALL, target_modules=("c_attn", "c_fc"), parts={"c_attn": ("q", "v")},
            rank_pattern={"c_fc": 2},
        ),
        BlockLoRAConfig(**SMALL, parts={"c_attn": {"v": (16, 24)}}),
    ],
    ids=range(4),
)  # fmt: skip
def test_save_and_load(config, tmp_path):
    model, run = model_and_output("gpt2")
    base = copy.deepcopy(model)
    trained(attach(model, config))
    path = tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    loaded = load_adapter(copy.deepcopy(base), path, name="from_file")
    assert torch.equal(run(loaded), run(model))
    assert trainable_parameters(loaded) == trainable_parameters(model)
    set_adapter(loaded, None)
    assert torch.equal(run(loaded), run(base))
    with torch.no_grad():
        base.transformer.h[1].mlp.c_fc.weight[0, 0] += 1
    with pytest.raises(ValueError, match="another base: 1 tensors differ, the first is transf"):
        load_adapter(base, path)
    json.dumps(config.to_dict())


def test_a_head_is_saved_with_the_factors(tmp_path):
    model, run = model_and_output("vit")
    base = copy.deepcopy(model)
    trained(attach(model, BlockLoRAConfig(**SMALL)))
    with torch.no_grad():
        model.classifier.adapter.weight.add_(1.0)
    save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(run(load_adapter(base, tmp_path / "a.safetensors")), run(model))
