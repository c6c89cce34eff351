"""Block-LoRA in whole models: which layers, and which parts of fused ones."""

import copy

import pytest
import torch
import torch.distributed.fsdp
from torch import nn

from block_lora_layers import (
    KINDS,
    SMALL,
    PlainLayer,
    layers,
    model_and_output,
    relative,
    trained,
)
from nn_models import OWN, VisionTransformer, inputs_of, output_of
from partune.nn import (
    BlockLoRAConfig,
    BlockLoRALinear,
    attach,
    detach,
    disable_adapter,
    merge,
    trainable_parameters,
)
from partune.nn._block_lora_layers import BlockLoRAConv1D, BlockLoRAOther
from partune.nn._layers import TrainedCopy


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, is_decoder=True,
    )  # fmt: skip
    model = transformers.BertLMHeadModel(config)
    assert isinstance(model.cls.predictions.decoder, nn.Linear)
    attach(model, BlockLoRAConfig(**SMALL))
    inside = {f"bert.encoder.layer.0.{name}" for name in BERT}
    assert set(layers(model)) == inside | {"cls.predictions.transform.dense"}


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
