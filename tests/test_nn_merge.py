"""merge: the plain model computes the same, saves and loads; what can't be merged is refused."""

import copy

import pytest
import torch
from torch import nn

from nn_models import OWN, LayerNorm2d, disturbed, inputs_of, output_of, transformers_model
from partune.nn import ScaleShiftConfig, attach, merge, set_adapter

TOLERANCE = 1e-5  # relative to the largest output, in float32
FAMILIES = ["vit", "deit", "dinov2", "swin", "convnext", "ast", "clip", "llama", "gpt2", "bert"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def relative(got, wanted):
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


def assert_plain(model, classes):
    assert [(name, type(module)) for name, module in model.named_modules()] == classes


@pytest.mark.parametrize("kind", FAMILIES)
def test_merged_save_pretrained_and_reloaded(kind, tmp_path):
    model, inputs = transformers_model(kind), inputs_of(kind)
    classes = [(name, type(module)) for name, module in model.named_modules()]
    keys = list(model.state_dict())
    base = output_of(model, inputs)
    attach(model, ScaleShiftConfig(init_std=0.2))
    unmerged = output_of(model, inputs)
    report = merge(model, inputs)
    merged = output_of(model, inputs)
    assert relative(unmerged, base) > 1e-2, "the adapter does something"
    assert relative(merged, unmerged) <= TOLERANCE
    assert report.relative_drift <= TOLERANCE and report.biases == ()
    assert_plain(model, classes)
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(output_of(type(model).from_pretrained(tmp_path).eval(), inputs), merged)


@pytest.mark.parametrize("kind", OWN)
def test_merged_models_of_torch(kind):
    model, images = disturbed(OWN[kind]()), torch.randn(2, 3, 16, 16)
    classes = [(name, type(module)) for name, module in model.named_modules()]
    attach(model, ScaleShiftConfig(init_std=0.2))
    unmerged = model(images)
    report = merge(model, images)
    assert relative(model(images), unmerged) <= TOLERANCE
    assert report.layers == sum(1 for _ in classes if hasattr(_[1], "weight")) or report.layers > 3
    assert_plain(model, classes)
    other = OWN[kind]().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))


def test_the_drift_is_what_it_says():
    model, images = disturbed(OWN["timm-vit"]()).bfloat16(), torch.randn(4, 3, 16, 16).bfloat16()
    model.train()
    attach(model, ScaleShiftConfig(init_std=0.2))
    unmerged = model(images)
    report = merge(model, (images,))
    difference = (model(images).double() - unmerged.double()).abs().max()
    assert report.largest_drift == float(difference) > 0
    assert report.relative_drift == float(difference / unmerged.double().abs().max())
    assert model.training and report.layers == 15


def test_merging_is_in_float32():
    layer = nn.Linear(64, 64).bfloat16()
    model = attach(nn.Sequential(layer), ScaleShiftConfig(init_std=0.5))
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    scale, shift = layer.adapter.scale.detach().clone(), layer.adapter.shift.detach().clone()
    assert scale.dtype == torch.float32
    merge(model)
    assert torch.equal(layer.weight, (scale[:, None] * weight.float()).bfloat16())
    assert torch.equal(layer.bias, (scale * bias.float() + shift).bfloat16())


def test_biases_are_created_where_a_shift_needs_them():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(2), nn.Linear(16, 8, bias=False),
        nn.LayerNorm(8, bias=False), nn.LayerNorm(8, elementwise_affine=False),
    )  # fmt: skip
    x = torch.randn(2, 3, 6, 6)
    attach(model, ScaleShiftConfig(shift=True, init_std=0.2))
    unmerged = model(x)
    report = merge(model, x)
    assert report.biases == ("0.bias", "2.bias", "3.bias", "4.weight", "4.bias")
    assert relative(model(x), unmerged) <= TOLERANCE
    assert [type(module) for module in model][2] is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_a_config_that_can_say_so_gets_its_biases(targets, tmp_path):
    """Llama's flags attention_bias and mlp_bias: all biases of a flag, the others 0."""
    model, inputs = transformers_model("llama"), inputs_of("llama")
    linear = r".*_proj" if targets is None else targets
    attach(model, ScaleShiftConfig(target_modules=linear, shift=True, init_std=0.2))
    unmerged = output_of(model, inputs)
    report = merge(model, inputs)
    assert report.relative_drift <= TOLERANCE and len(report.biases) == 14
    assert model.config.attention_bias and model.config.mlp_bias
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output_of(reloaded, inputs), output_of(model, inputs))
    assert relative(output_of(reloaded, inputs), unmerged) <= TOLERANCE


def test_layer_norm_over_channels_first_merges_after_a_trial():
    model = attach(nn.Sequential(disturbed(LayerNorm2d(6))), ScaleShiftConfig(init_std=0.2))
    x = torch.randn(2, 6, 3, 5)
    unmerged = model(x)
    assert merge(model, x).relative_drift <= TOLERANCE
    assert type(model[0]) is LayerNorm2d and relative(model(x), unmerged) <= TOLERANCE


# ---- refused, and nothing changed ----


class Standardised(nn.Conv2d):
    """Its output doesn't scale with its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return attach(model, ScaleShiftConfig(target_modules=["1"]))


def in_training():
    return attach(OWN["convnet"](), ScaleShiftConfig()).train()


def several():
    model = attach(nn.Sequential(nn.Linear(4, 4)), ScaleShiftConfig(), name="a")
    return attach(model, ScaleShiftConfig(), name="b")


def disabled():
    model = attach(nn.Sequential(nn.Linear(4, 4)), ScaleShiftConfig())
    set_adapter(model, None)
    return model


def with_shift(kind, targets):
    model = transformers_model(kind)
    return attach(model, ScaleShiftConfig(target_modules=targets, shift=True))


REFUSED = [
    (lambda: with_shift("llama", ["norm"]), "model.norm: a LlamaRMSNorm has no bias to take the"),
    (lambda: attach(nn.Sequential(nn.RMSNorm(4)), ScaleShiftConfig(shift=True)),
     "0: a RMSNorm has no bias to take the shift; train it with shift=False, or leave"),
    (lambda: with_shift("qwen2", ["down_proj"]),
     "model.layers.0.mlp.down_proj.bias: the config of a Qwen2ForCausalLM can't express"),
    (lambda: with_shift("clip", ["patch_embedding"]), "the config of a CLIPModel can't express"),
    (lambda: attach(transformers_model("gemma"), ScaleShiftConfig()),
     "a GemmaRMSNorm computes its output in a way of its own"),
    (lambda: attach(nn.Sequential(Standardised(3, 4, 3)), ScaleShiftConfig()),
     "0: a Standardised computes its output in a way of its own"),
    (in_training, r"bn1: BatchNorm is in training mode; call model.eval\(\) before merging"),
    (tied, "1: its weight is shared with another module"),
    (several, r"name: \['a', 'b'\] are attached, want one; detach the others first"),
    (disabled, "name: no adapter is active"),
    (lambda: nn.Linear(4, 4), "got a Linear without adapters; attach one first"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_merge_refuses(make, message):
    model = make()
    classes = [(name, type(module)) for name, module in model.named_modules()]
    state = copy.deepcopy(model.state_dict())
    config = copy.deepcopy(getattr(model, "config", None))
    with pytest.raises(ValueError, match=message) as caught:
        merge(model)
    assert "\n" not in str(caught.value)
    assert_plain(model, classes)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    if config is not None:
        assert config.to_dict() == model.config.to_dict()


def test_a_batch_that_fails_leaves_the_model_unmerged():
    model = attach(nn.Sequential(nn.Linear(4, 4)), ScaleShiftConfig())
    weight = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError):
        merge(model, torch.ones(2, 5))
    assert torch.equal(model[0].weight, weight) and type(model[0]) is not nn.Linear
