"""Block-LoRA in whole models: which layers, fused parts, names, merging, rows of a batch, files."""

import copy
import json

import pytest
import torch
from torch import nn

from block_lora_layers import PlainLayer, trained
from nn_models import OWN, VisionTransformer, disturbed, inputs_of, output_of, transformers_model
from partune.nn import (
    BlockLoRA,
    BlockLoRAConfig,
    BlockLoRALinear,
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
from partune.nn._block_lora_layers import BlockLoRAConv1D, BlockLoRALayer, BlockLoRAOther
from partune.nn._layers import TrainedCopy

KINDS = ["vit", "swin", "clip", "llama", "gpt2", "bert", "timm-vit"]
SMALL = dict(rank=4, blocks=2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def model_and_output(kind, **options):
    """A model, and what computes its output on some input."""
    if kind in OWN:
        images = torch.randn(2, 3, 16, 16)
        return disturbed(OWN[kind]()), lambda model: model(images)
    inputs = inputs_of(kind)
    return transformers_model(kind, **options), lambda model: output_of(model, inputs)


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockLoRALayer)}


def relative(got, wanted):
    return float((got - wanted).abs().max().detach() / wanted.abs().max().detach())


# ---- which layers ----

VIT = {"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
       "mlp.fc1", "mlp.fc2"}  # fmt: skip
LLAMA = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}  # fmt: skip
CLIP = {"self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj",
        "mlp.fc1", "mlp.fc2"}  # fmt: skip
BERT = {"attention.self.query", "attention.self.key", "attention.self.value",
        "attention.output.dense", "intermediate.dense", "output.dense"}  # fmt: skip
TARGETS = {
    "vit": [("vit.layers.{}.", VIT)],
    "swin": [("swin.encoder.layers.{}.blocks.0.", VIT)],
    "clip": [
        ("vision_model.encoder.layers.{}.", CLIP),
        ("text_model.encoder.layers.{}.", CLIP),
    ],
    "llama": [("model.layers.{}.", LLAMA)],
    "gpt2": [("transformer.h.{}.", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"})],
    "bert": [("encoder.layer.{}.", BERT)],
    "timm-vit": [("blocks.{}.", {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"})],
}


@pytest.mark.parametrize("kind", TARGETS)
def test_all_linear_layers_but_the_head(kind):
    model, _ = model_and_output(kind)
    attach(model, BlockLoRAConfig(**SMALL))
    expected = {
        block.format(i) + name for block, names in TARGETS[kind] for i in range(2) for name in names
    }
    if kind == "swin":
        expected.add("swin.encoder.layers.0.downsample.reduction")
    assert set(layers(model)) == expected
    assert all(type(m) is BlockLoRALinear for m in layers(model).values()) == (kind != "gpt2")
    heads = [name for name, module in model.named_modules() if isinstance(module, TrainedCopy)]
    assert heads == {"vit": ["classifier"], "swin": ["classifier"], "timm-vit": ["head"]}.get(
        kind, []
    )


def test_output_embeddings_of_any_name_are_left_out():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config)
    attach(model, BlockLoRAConfig(**SMALL))
    names = {name.rpartition(".")[2] for name in layers(model)}
    assert names == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_targets_and_head_by_name():
    model = attach(VisionTransformer(), BlockLoRAConfig(target_modules=["qkv", "1.mlp.fc1"]))
    assert set(layers(model)) == {"blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.mlp.fc1"}
    model = attach(
        VisionTransformer(), BlockLoRAConfig(target_modules=r".*fc\d", modules_to_save=())
    )
    assert set(layers(model)) == {f"blocks.{i}.mlp.fc{j}" for i in range(2) for j in (1, 2)}
    assert not any(isinstance(module, TrainedCopy) for module in model.modules())
    lone = attach(nn.Linear(4, 6), BlockLoRAConfig(rank=2))
    assert type(lone) is BlockLoRALinear and trainable_parameters(lone)[0] == 4 * 2 // 2 + 2 * 6


def test_ranks_and_alphas_by_pattern():
    config = BlockLoRAConfig(
        rank=4, alpha=2.0, rank_pattern={"fc1": 2, "1.mlp.fc1": 6}, alpha_pattern={"attn.proj": 8.0}
    )
    model = attach(VisionTransformer(), config)
    found = {n: (m.adapter.rank, m.adapter.scale) for n, m in layers(model).items()}
    for i in range(2):
        assert found[f"blocks.{i}.attn.qkv"] == found[f"blocks.{i}.mlp.fc2"] == (4, 0.5)
        assert found[f"blocks.{i}.attn.proj"] == (4, 2.0)
    assert found["blocks.0.mlp.fc1"] == (2, 1.0) and found["blocks.1.mlp.fc1"] == (6, 2.0 / 6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_plain_layers(kind):
    model, run = model_and_output(kind)
    model = model.double()
    inputs = {}
    if kind in OWN:
        images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        run = lambda model: model(images)  # noqa: E731
    else:
        for name, value in inputs_of(kind).items():
            inputs[name] = value.double() if value.is_floating_point() else value
        run = lambda model: output_of(model, inputs)  # noqa: E731
    plain = copy.deepcopy(model).requires_grad_(False)
    trained(attach(model, BlockLoRAConfig(**SMALL, modules_to_save=())))
    for name, layer in layers(model).items():
        owner, _, leaf = name.rpartition(".")
        wrapped = PlainLayer(plain.get_submodule(name), copy.deepcopy(layer.adapter), {})
        setattr(plain.get_submodule(owner), leaf, wrapped)
    outputs = run(model), run(plain)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for name, layer in layers(model).items():
        for key in ("down", "up"):
            got = layer.adapter.get_parameter(key).grad
            wanted = plain.get_submodule(name).adapter.get_parameter(key).grad
            torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-10)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


class Scaled(nn.Linear):
    """Its output isn't that of its weight alone."""

    def forward(self, x):
        return 2 * super().forward(x)


class Foreign(nn.Module):
    """A linear layer that isn't torch's, as other packages have them."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.register_buffer("packed", torch.randint(-8, 8, (6, 8), dtype=torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, 0.1 * self.packed.to(x.dtype))


@pytest.mark.parametrize("make", [lambda: Scaled(8, 6), Foreign], ids=["subclass", "foreign"])
def test_layers_that_compute_in_a_way_of_their_own(make):
    base = nn.Sequential(make())
    model = trained(attach(copy.deepcopy(base), BlockLoRAConfig(**SMALL)))
    assert isinstance(model[0], BlockLoRAOther)
    plain = PlainLayer(base[0], copy.deepcopy(model[0].adapter), {})
    x = torch.randn(5, 8, requires_grad=True)
    torch.testing.assert_close(model(x), plain(x))
    (ours,) = torch.autograd.grad(model(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(plain(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match=r"0: (a Scaled computes|its weight is quantised)"):
        merge(model)
    assert torch.equal(detach(model)(x), base(x))


# ---- fused layers ----


@pytest.mark.parametrize("share", ["input", "rank"])
@pytest.mark.parametrize("wanted", [("q", "v"), ("k",), ("v", "k", "q")])
def test_parts_of_gpt2s_qkv(wanted, share):
    model, run = model_and_output("gpt2")
    config = BlockLoRAConfig(
        **SMALL, share=share, target_modules=["c_attn"], parts={"c_attn": wanted}
    )
    base = copy.deepcopy(model)
    trained(attach(model, config))
    thin = 4 * 8 // 2 if share == "input" else 4 // 2 * 8
    assert trainable_parameters(model)[0] == 2 * len(wanted) * (thin + 4 * 8)
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, BlockLoRAConv1D)
    starts = {"q": 0, "k": 8, "v": 16}
    plain = PlainLayer(base.transformer.h[0].attn.c_attn, copy.deepcopy(layer.adapter), starts)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(layer(x), plain(x))
    untouched = [i for part, i in starts.items() if part not in wanted]
    for start in untouched:
        rows = slice(start, start + 8)
        assert torch.equal(layer(x)[..., rows], plain.layer(x)[..., rows])
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    for name, parameter in plain.adapter.named_parameters():
        torch.testing.assert_close(layer.adapter.get_parameter(name).grad, parameter.grad)
    unmerged = run(model)
    assert merge(model, inputs_of("gpt2")).relative_drift <= 1e-5
    assert relative(run(model), unmerged) <= 1e-5


def phi3():
    """With grouped queries: 4 heads of q beside 2 of k and v, 4 wide each."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Phi3Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config).eval()


def test_parts_of_grouped_queries_and_of_gate_and_up():
    base = phi3()
    parts = {"qkv_proj": ["k", "v"], "gate_up_proj": ["up"]}
    model = trained(attach(copy.deepcopy(base), BlockLoRAConfig(**SMALL, parts=parts)))
    x = torch.randn(2, 3, 16)
    for path, starts, changed in (
        ("self_attn.qkv_proj", {"k": 16, "v": 24}, range(16, 32)),
        ("mlp.gate_up_proj", {"up": 24}, range(24, 48)),
    ):
        layer = model.model.layers[0].get_submodule(path)
        frozen = base.model.layers[0].get_submodule(path)
        plain = PlainLayer(frozen, copy.deepcopy(layer.adapter), starts)
        torch.testing.assert_close(layer(x), plain(x))
        different = (layer(x) != frozen(x)).any(0).any(0).nonzero().flatten()
        assert set(different.tolist()) == set(changed)


def test_parts_that_take_turns_in_each_head():
    """GPT-NeoX: q, k and v of one head, then of the next."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config)
    parts = {"query_key_value": ["v"]}
    trained(attach(model, BlockLoRAConfig(target_modules=["query_key_value"], parts=parts)))
    layer = model.gpt_neox.layers[0].attention.query_key_value
    x = torch.randn(3, 8)
    output = layer(x)
    with disable_adapter(model):
        different = (layer(x) != output).any(0).nonzero().flatten()
    assert different.tolist() == [8, 9, 10, 11, 20, 21, 22, 23]
    delta = layer.adapter.delta()
    assert delta.any(1).nonzero().flatten().tolist() == different.tolist()


def test_parts_by_ranges():
    model = nn.Sequential(nn.Linear(8, 12))
    parts = {"0": {"first": (0, 3), "last": (10, 12)}}
    base = copy.deepcopy(model[0])
    trained(attach(model, BlockLoRAConfig(**SMALL, parts=parts)))
    plain = PlainLayer(base, copy.deepcopy(model[0].adapter), {"first": 0, "last": 10})
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), plain(x))
    assert set(model[0].block_lora["default"].state_dict()) == {
        "first.down", "first.up", "last.down", "last.up",
    }  # fmt: skip


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
    drift = merge(model, inputs, keep=keep).relative_drift
    assert drift <= {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert list(model.state_dict()) == list(state), "what is kept is no part of the model's state"
    assert not torch.equal(model.transformer.h[0].attn.c_attn.weight,
                           state["transformer.h.0.attn.c_attn.weight"])  # fmt: skip
    other = copy.deepcopy(model)
    report = unmerge(model, inputs)
    assert report.layers == 8 and report.relative_drift == pytest.approx(drift, rel=1e-2)
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


# ---- whole models, checkpointed, compiled, exported, cast ----


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_gradient_checkpointing_with_dropout(kind):
    model, run = model_and_output(kind)
    trained(attach(model, BlockLoRAConfig(**SMALL, dropout=0.3))).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(5)
        run(model).square().sum().backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("kind", ["vit", "llama", "gpt2"])
def test_compile_whole(kind):
    torch._dynamo.reset()
    model, run = model_and_output(kind)
    trained(attach(model, BlockLoRAConfig(**SMALL)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = run(model), run(compiled)
    assert relative(outputs[1], outputs[0]) <= 1e-5
    gradients = []
    for output in outputs:
        model.zero_grad()
        output.square().sum().backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=2e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["vit", "llama", "gpt2"])
def test_export(kind):
    model, _ = model_and_output(kind)
    trained(attach(model, BlockLoRAConfig(**SMALL)))
    model.config.use_cache = False  # a cache in the output can't be exported
    example = inputs_of(kind)
    exported = torch.export.export(model, (), example).module()
    assert relative(output_of(exported, example), output_of(model, example)) <= 1e-5


@pytest.mark.parametrize("kind", ["vit", "llama", "gpt2"])
def test_bfloat16_and_autocast(kind):
    model, run = model_and_output(kind)
    trained(attach(model, BlockLoRAConfig(**SMALL)), 0.1)
    exact = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model)
    assert relative(output.float(), exact) <= 5e-2
    output.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    detach(model)
    attach(model.bfloat16(), BlockLoRAConfig(**SMALL))
    factors = [m for m in model.modules() if isinstance(m, BlockLoRA)]
    assert factors and all(module.down.dtype == torch.float32 for module in factors)
