"""attach: which layers get a scale and shift in which model, what they become, what fuses."""

import copy
import pickle

import pytest
import torch
from torch import nn

from nn_models import OWN, VisionTransformer, inputs_of, output_of, transformers_model
from partune.nn import (
    ScaleShift,
    ScaleShiftConfig,
    attach,
    detach,
    print_trainable_parameters,
    set_adapter,
    trainable_parameters,
)
from partune.nn._layers import TrainedCopy
from partune.nn._scale_shift_layers import FusedActivation, ScaleShiftLayer, ScaleShiftOther


def sites(model):
    return {n: m.adapter for n, m in model.named_modules() if isinstance(m, ScaleShiftLayer)}


def fused(model):
    return [n for n, m in model.named_modules() if isinstance(m, FusedActivation)]


def vit_base(labels):
    """ViT-B/16 on the meta device is refused, as its base has no fingerprint: real weights."""
    transformers = pytest.importorskip("transformers")
    if labels:
        return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=labels))
    return transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False)


@pytest.mark.parametrize(("labels", "trained"), [(0, 205_824), (100, 282_724)])
def test_parameters_of_vit_base(labels, trained, capsys):
    model = vit_base(labels)
    total = sum(p.numel() for p in model.parameters())
    attach(model, ScaleShiftConfig())
    assert trainable_parameters(model) == (trained, total + trained)
    print_trainable_parameters(model)
    assert capsys.readouterr().out.startswith(f"trainable params: {trained:,d} || all params: ")
    scales = torch.cat([site.scale.detach() for site in sites(model).values()])
    shifts = torch.cat([site.shift.detach() for site in sites(model).values()])
    assert abs(scales.mean() - 1) < 5e-4 and abs(shifts.mean()) < 5e-4
    assert abs(scales.std() - 0.02) < 5e-4 and abs(shifts.std() - 0.02) < 5e-4


# Sites per model: in each block, around the blocks, and GELUs computed with the layer before.
VIT = ({"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
        "layernorm_before", "layernorm_after", "mlp.fc1", "mlp.fc2"})  # fmt: skip
CLIP_BLOCK = {"self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj",
              "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"}  # fmt: skip
LLAMA_BLOCK = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
               "input_layernorm", "post_attention_layernorm"}  # fmt: skip
SITES = {
    "vit": ("vit.layers.{}.", VIT, {"vit.embeddings.patch_embeddings.projection", "vit.layernorm"}),
    "deit": (
        "deit.layers.{}.", VIT, {"deit.embeddings.patch_embeddings.projection", "deit.layernorm"},
    ),
    "ast": (
        "audio_spectrogram_transformer.layers.{}.", VIT,
        {"audio_spectrogram_transformer.embeddings.patch_embeddings.projection",
         "audio_spectrogram_transformer.layernorm"},
    ),
    "dinov2": (
        "dinov2.encoder.layer.{}.",
        (VIT - {"layernorm_before", "layernorm_after"}) | {"norm1", "norm2"},
        {"dinov2.embeddings.patch_embeddings.projection", "dinov2.layernorm"},
    ),
    "swin": (
        "swin.encoder.layers.{}.blocks.0.", VIT,
        {"swin.embeddings.patch_embeddings.projection", "swin.embeddings.norm",
         "swin.encoder.layers.0.downsample.norm", "swin.layernorm"},
    ),
    "convnext": (
        "convnext.encoder.stages.{}.layers.0.", {"dwconv", "layernorm", "pwconv1", "pwconv2"},
        {"convnext.embeddings.patch_embeddings", "convnext.embeddings.layernorm",
         "convnext.encoder.stages.1.downsampling_layer.0",
         "convnext.encoder.stages.1.downsampling_layer.1", "convnext.layernorm"},
    ),
    "clip": (
        "vision_model.encoder.layers.{}.", CLIP_BLOCK,
        {"vision_model.embeddings.patch_embedding", "vision_model.pre_layrnorm",
         "vision_model.post_layernorm", "text_model.final_layer_norm"}
        | {f"text_model.encoder.layers.{i}.{name}" for i in range(2) for name in CLIP_BLOCK},
    ),
    "llama": ("model.layers.{}.", LLAMA_BLOCK, {"model.norm"}),
    "gpt2": (
        "transformer.h.{}.",
        {"ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
        {"transformer.ln_f"},
    ),
}  # fmt: skip
FUSED = {"clip": 0, "llama": 0}  # quick_gelu and silu; one in each block elsewhere


@pytest.mark.parametrize("kind", SITES)
def test_sites_in_transformers(kind):
    model = attach(transformers_model(kind), ScaleShiftConfig())
    block, inside, around = SITES[kind]
    expected = around | {block.format(i) + name for i in range(2) for name in inside}
    assert set(sites(model)) == expected
    assert len(fused(model)) == FUSED.get(kind, 2)
    unshifted = {name for name, site in sites(model).items() if site.shift is None}
    if kind in ("llama", "gpt2"):
        assert unshifted == set(sites(model)), "a decoder has scales alone"
    else:
        without_bias = {"vision_model.embeddings.patch_embedding"} if kind == "clip" else set()
        assert unshifted == without_bias


TIMM = {
    "timm-vit": {"patch_embed.proj", "norm"} | {
        f"blocks.{i}.{name}" for i in range(2)
        for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    },
    "timm-convnext": {"stem.0", "stem.1", "head.norm"} | {
        f"stages.0.{name}" for name in (
            "downsample.0", "downsample.1", "blocks.0.conv_dw", "blocks.0.norm",
            "blocks.0.mlp.fc1", "blocks.0.mlp.fc2",
        )
    },
    "convnet": {"conv1", "bn1", "conv2", "gn"},
}  # fmt: skip


@pytest.mark.parametrize("kind", TIMM)
def test_sites_by_timms_names_and_by_pattern(kind):
    model = attach(OWN[kind](), ScaleShiftConfig())
    assert set(sites(model)) == TIMM[kind]
    assert len(fused(model)) == {"timm-vit": 2, "timm-convnext": 1, "convnet": 0}[kind]
    first_dimension = {name for name, site in sites(model).items() if site.channel_dim == 1}
    expected = {
        "timm-vit": {"patch_embed.proj"},
        "timm-convnext": {"stem.0", "stem.1", "head.norm", "stages.0.downsample.0",
                          "stages.0.downsample.1", "stages.0.blocks.0.conv_dw"},
        "convnet": TIMM["convnet"],
    }[kind]  # fmt: skip
    assert first_dimension == expected
    heads = [name for name, module in model.named_modules() if isinstance(module, TrainedCopy)]
    assert heads == [{"timm-vit": "head", "timm-convnext": "head.fc", "convnet": "fc"}[kind]]


@pytest.mark.parametrize("kind", ["vit", "convnext", "llama", "gpt2"])
def test_swapped_layers_stay_what_they_were(kind):
    model = transformers_model(kind)
    classes = {name: type(module) for name, module in model.named_modules()}
    keys, values = list(model.state_dict()), copy.deepcopy(model.state_dict())
    identities = dict(model.named_modules())
    attach(model, ScaleShiftConfig())
    for name, original in classes.items():
        assert isinstance(model.get_submodule(name), original)
        assert model.get_submodule(name) is identities[name]
    state = model.state_dict()
    assert [key for key in state if key in values] == keys
    assert all(torch.equal(state[key], value) for key, value in values.items())
    added = {key for key in state if key not in values}
    assert all(".scale_shift.default." in key or ".trained.default." in key for key in added)
    detach(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_trains():
    model = VisionTransformer()
    model.norm.weight.requires_grad_(False)
    attach(model, ScaleShiftConfig())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if ".scale_shift." not in n} == {
        "head.trained.default.weight", "head.trained.default.bias",
    }  # fmt: skip
    detach(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"norm.weight"}, "requires_grad is what it was"


def test_the_head_can_be_named_or_left_frozen():
    model = attach(VisionTransformer(), ScaleShiftConfig(modules_to_save=["blocks.1.mlp", "head"]))
    heads = {name for name, module in model.named_modules() if isinstance(module, TrainedCopy)}
    assert heads == {"blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "head"}
    assert "blocks.1.mlp.fc1" not in sites(model) and "blocks.0.mlp.fc1" in sites(model)
    model = attach(VisionTransformer(), ScaleShiftConfig(modules_to_save=()))
    assert not any(isinstance(module, TrainedCopy) for module in model.modules())


def test_targets_by_suffix_and_by_regular_expression():
    model = attach(VisionTransformer(), ScaleShiftConfig(target_modules=["attn.qkv", "norm"]))
    assert set(sites(model)) == {"blocks.0.attn.qkv", "blocks.1.attn.qkv", "norm"}
    model = attach(VisionTransformer(), ScaleShiftConfig(target_modules=r"blocks\.\d\.mlp\.fc."))
    assert set(sites(model)) == {f"blocks.{i}.mlp.fc{j}" for i in range(2) for j in (1, 2)}


def test_layers_of_a_kind_of_their_own_are_followed_unfused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    base = nn.Sequential(Doubled(4, 4), nn.GELU())
    model = attach(copy.deepcopy(base), ScaleShiftConfig())
    assert isinstance(model[0], ScaleShiftOther) and not fused(model)
    x = torch.randn(3, 4)
    site = model[0].adapter
    assert torch.equal(model[0](x), site(base[0](x)))


# ---- what must not fuse ----


class Twice(nn.Module):
    """The output before the GELU is used again."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act = nn.Linear(4, 4), nn.GELU()

    def forward(self, x):
        y = self.fc1(x)
        return y + self.act(y)


class Between(nn.Module):
    """Something stands between layer and GELU."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act = nn.Linear(4, 4), nn.GELU()

    def forward(self, x):
        return self.act(self.fc1(x) + 1)


class Shared(nn.Module):
    """One GELU for two layers."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.GELU()

    def forward(self, x):
        return self.act(self.fc2(self.act(self.fc1(x))))


class Untraceable(nn.Module):
    """Which path is taken depends on the values."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act = nn.Linear(4, 4), nn.GELU()

    def forward(self, x):
        return self.act(self.fc1(x)) if x.sum() > 0 else self.fc1(x)


class Quick(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act = nn.Linear(4, 4), QuickGELU()

    def forward(self, x):
        return self.act(self.fc1(x))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("kind", [Twice, Between, Shared, Untraceable, Quick])
def test_gelus_that_stay_apart(kind):
    base = kind()
    model = attach(copy.deepcopy(base), ScaleShiftConfig(init_std=0.5))
    assert not fused(model) and sites(model)
    with torch.no_grad():
        for name, site in sites(model).items():  # the plain layer that computes the same
            layer = base.get_submodule(name)
            layer.weight.mul_(site.scale[:, None])
            layer.bias.mul_(site.scale).add_(site.shift)
    x = torch.randn(5, 4)
    torch.testing.assert_close(model(x), base(x))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelus_that_fuse(approximate):
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(approximate), nn.Conv2d(8, 4, 1))
    model = attach(copy.deepcopy(base), ScaleShiftConfig())
    assert fused(model) == ["1"]
    x = torch.randn(2, 3, 6, 6)
    inner = sites(model)["0"].scale.view(-1, 1, 1) * base[0](x)
    inner = inner + sites(model)["0"].shift.view(-1, 1, 1)
    torch.testing.assert_close(model[:2](x), base[1](inner))
    set_adapter(model, None)
    assert type(model[1]) is nn.GELU and torch.equal(model(x), base(x))


def test_rms_norms_are_told_by_what_they_compute():
    gemma = attach(transformers_model("gemma"), ScaleShiftConfig())
    norms = [m for n, m in gemma.named_modules() if n in sites(gemma) and "norm" in n]
    assert norms and all(isinstance(norm, ScaleShiftOther) for norm in norms), "Gemma's adds 1"
    llama = attach(transformers_model("llama"), ScaleShiftConfig())
    assert not any(isinstance(module, ScaleShiftOther) for module in llama.modules())
    torch_own = attach(nn.Sequential(nn.RMSNorm(4)), ScaleShiftConfig())
    assert not isinstance(torch_own[0], ScaleShiftOther)


# ---- the module by hand ----


def test_scale_shift_by_hand():
    layer = ScaleShift(4, channel_dim=1, init_std=0.5, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    expected = x * layer.scale.view(4, 1, 1) + layer.shift.view(4, 1, 1)
    torch.testing.assert_close(layer(x), expected)
    last = ScaleShift(4, channel_dim=-1, shift=False)
    y = torch.randn(3, 4)
    assert torch.equal(last(y), y * last.scale) and last.shift is None
    assert repr(last) == "ScaleShift(4, channel_dim=-1, shift=False)"
    other = ScaleShift(4, channel_dim=-1, shift=False)
    other.load_state_dict(last.state_dict())
    assert torch.equal(other(y), last(y))
    assert torch.equal(pickle.loads(pickle.dumps(last))(y), last(y))


def test_the_start_is_not_the_identity():
    torch.manual_seed(0)
    layer = ScaleShift(4096, channel_dim=-1)
    assert layer.scale.ne(1).all() and layer.shift.ne(0).all()
    inputs = inputs_of("vit")
    model = transformers_model("vit")
    before = output_of(model, inputs)
    after = output_of(attach(model, ScaleShiftConfig()), inputs)
    assert (before - after).abs().max() > 1e-3
