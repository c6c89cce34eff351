"""Adapters of a model, given what can't be: one sentence each, and nothing is changed."""

import copy

import pytest
import torch
from torch import nn

from nn_models import ConvNet, VisionTransformer
from partune.nn import ScaleShift, ScaleShiftConfig, attach, detach, set_adapter


def unchanged(model, act):
    classes = {name: type(module) for name, module in model.named_modules()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    act()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Odd(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias)


ENCODER = nn.TransformerEncoderLayer(4, 1, 8)
BAD = [
    (nn.Sequential(nn.Linear(4, 4)), dict(target_modules=["q_proj"]),
     ValueError, r"target_modules: \['q_proj'\] matched no layer of Sequential, which has 0"),
    (VisionTransformer(), dict(target_modules=["qkv", "kqv"]), ValueError, r"\['kqv'\] matched no"),
    (nn.Sequential(nn.ReLU()), {}, ValueError, "matched no layer .* which has none for SSF"),
    (VisionTransformer(), dict(target_modules=["attn"]), TypeError,
     "blocks.0.attn is a Attention, want a linear layer"),
    (VisionTransformer(), dict(target_modules=["head"]), ValueError, "head is in the head"),
    (VisionTransformer(), dict(modules_to_save=["classifier"]), ValueError,
     "modules_to_save: got 'classifier', which is no module of VisionTransformer; its top modules"),
    (nn.Sequential(Odd(4)), {}, ValueError, "channel_dim: 0, a Odd, may have its channels last or"),
    (nn.Sequential(nn.LayerNorm((3, 4))), dict(target_modules=["0"]), TypeError, "a norm over the"),
    (nn.Sequential(nn.Embedding(4, 4)), dict(target_modules=["0"]), TypeError, "0 is a Embedding"),
    (ENCODER, dict(target_modules=["linear1"]), ValueError,
     "linear1 is computed by its TransformerEncoderLayer without being called"),
    (nn.Sequential(nn.MultiheadAttention(4, 1)), dict(target_modules=["out_proj"]), ValueError,
     "out_proj is computed by its MultiheadAttention"),
    (ENCODER, {}, ValueError, "matched no layer"),
    (nn.Sequential(nn.Linear(4, 4, device="meta")), {}, ValueError, "0.weight is on the meta"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "options", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_attach(model, options, error, message):
    def act():
        with pytest.raises(error, match=message) as caught:
            attach(model, ScaleShiftConfig(**options))
        assert "\n" not in str(caught.value)

    if any(parameter.is_meta for parameter in model.parameters()):
        act()
    else:
        unchanged(model, act)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(channel_dim=2), ValueError, "channel_dim: got 2, want None, -1 or 1"),
        (dict(init_std=-1.0), ValueError, "init_std: got -1.0, want at least 0"),
        (dict(modules_to_save="head"), TypeError, "got the string 'head', want a list"),
    ],
)
def test_bad_config(options, error, message):
    with pytest.raises(error, match=message):
        ScaleShiftConfig(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(channels=0, channel_dim=1), "channels: got 0, want an int of at least 1"),
        (dict(channels=2.0, channel_dim=1), "channels: got 2.0"),
        (dict(channels=4, channel_dim=2), "channel_dim: got 2, want -1"),
        (dict(channels=4, channel_dim=1, init_std=-0.1), "init_std: got -0.1"),
    ],
)
def test_bad_scale_shift(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScaleShift(**arguments)


def test_bad_names_and_second_attachments():
    model = attach(ConvNet(), ScaleShiftConfig())

    def act():
        with pytest.raises(ValueError, match="'default' is attached already; detach it or"):
            attach(model, ScaleShiftConfig())
        with pytest.raises(ValueError, match=r"name: got 'a\.b', want an identifier"):
            attach(model, ScaleShiftConfig(), name="a.b")
        with pytest.raises(TypeError, match="config: got dict, want one like"):
            attach(model, {"shift": True}, name="b")
        with pytest.raises(ValueError, match="conv1 has an adapter that was attached to another"):
            attach(nn.ModuleDict({"body": model}), ScaleShiftConfig(), name="b")
        with pytest.raises(ValueError, match=r"name: got 'b', want one of \['default'\]"):
            set_adapter(model, "b")
        with pytest.raises(ValueError, match="name: got 'b', want one of"):
            detach(model, "b")

    unchanged(model, act)
    for call in (lambda m: set_adapter(m, None), detach):
        with pytest.raises(ValueError, match="got a ConvNet without adapters; attach one first"):
            call(ConvNet())


def test_a_channel_dim_that_is_said_settles_it():
    model = attach(nn.Sequential(Odd(4)), ScaleShiftConfig(channel_dim=-1))
    assert model[0].adapter.channel_dim == -1
