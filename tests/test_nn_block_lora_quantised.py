"""Block-LoRA beside quantised layers: bitsandbytes' 8 and 4 bits, torchao's weight-only formats."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from block_lora_layers import PlainLayer, trained
from nn_models import inputs_of, output_of, transformers_model
from partune.nn import (
    BlockLoRAConfig,
    attach,
    detach,
    disable_adapter,
    fingerprint,
    load_adapter,
    merge,
    mixed_adapters,
    save_adapter,
    set_adapter,
    trainable_parameters,
)
from partune.nn._block_lora_layers import BlockLoRALayer, BlockLoRALinear, BlockLoRAOther

bitsandbytes = pytest.importorskip("bitsandbytes")
quantization = pytest.importorskip("torchao.quantization")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def four_bits(linear, quant_type, storage=torch.uint8):
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None,
        compute_dtype=linear.weight.dtype, quant_type=quant_type, quant_storage=storage,
    )  # fmt: skip
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # which quantises


def eight_bits(linear, threshold):
    layer = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None,
        has_fp16_weights=False, threshold=threshold,
    )  # fmt: skip
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def by_torchao(config):
    def quantise(linear):
        model = nn.Sequential(linear)
        quantization.quantize_(model, config())
        return model[0]

    return quantise


KINDS = {
    "nf4": lambda linear: four_bits(linear, "nf4"),
    "fp4": lambda linear: four_bits(linear, "fp4"),
    "nf4-stored-as-floats": lambda linear: four_bits(linear, "nf4", torch.bfloat16),
    "int8": lambda linear: eight_bits(linear, 0.0),
    "int8-with-outliers": lambda linear: eight_bits(linear, 6.0),
    "torchao-int8": by_torchao(quantization.Int8WeightOnlyConfig),
    "torchao-int4": by_torchao(
        lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(16)
        )
    ),
    "torchao-float8": by_torchao(quantization.Float8WeightOnlyConfig),
}


def quantised(model, kind):
    """The model with its linear layers quantised, but the head."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name not in ("lm_head", "classifier"):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, KINDS[kind](module))
    return model


def two_layers(kind, **options):
    base = quantised(nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32)), kind)
    plain = copy.deepcopy(base)
    model = attach(base, BlockLoRAConfig(rank=4, blocks=4, **options))
    return trained(model), plain


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients(kind, shape):
    model, base = two_layers(kind)
    expected = BlockLoRALinear if kind.startswith("torchao") else BlockLoRAOther
    assert isinstance(model[0], expected) and isinstance(model[2], expected)
    plain = nn.Sequential(
        *[
            PlainLayer(layer, copy.deepcopy(model[i].adapter), {}) if i != 1 else layer
            for i, layer in enumerate(base)
        ]
    )
    x = torch.randn(*shape, 64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, wanted = model(ours), plain(theirs)
    # of 8 bits: the next layer rounds its input to 8 bits, and a last bit may fall to either side
    tolerance = 2e-2 if kind.startswith("int8") else 1e-5
    close(got, wanted, tolerance)
    got.square().sum().backward()
    wanted.square().sum().backward()
    close(ours.grad, theirs.grad, max(tolerance, 2e-4))
    for i in (0, 2):
        for name, parameter in plain[i].adapter.named_parameters():
            close(model[i].adapter.get_parameter(name).grad, parameter.grad, max(tolerance, 2e-4))


def close(got, wanted, tolerance):
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    error = float((got - wanted).detach().abs().max())
    assert error <= tolerance * float(wanted.detach().abs().max()), error


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16(kind):
    linear = nn.Linear(64, 32).bfloat16()
    base = nn.Sequential(KINDS[kind](copy.deepcopy(linear))).requires_grad_(False)
    model = trained(attach(copy.deepcopy(base), BlockLoRAConfig(rank=4)))
    assert model[0].adapter.down.dtype == torch.float32
    x = torch.randn(5, 64).bfloat16()
    plain = PlainLayer(base[0], model[0].adapter, {})
    output = model(x)
    assert output.dtype == torch.bfloat16
    close(output, plain(x), 2e-2)
    output.float().square().sum().backward()
    assert model[0].adapter.up.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_the_base_alone(kind):
    model, plain = two_layers(kind, dropout=0.1)
    before, x = fingerprint(plain), torch.randn(16, 64)
    target = torch.randn(16, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    assert trainable_parameters(model)[0] == 64 + 48 * 4 + 48 + 32 * 4
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    with disable_adapter(model):
        assert torch.equal(model(x), plain(x))
    detach(model)
    assert fingerprint(model) == before
    assert torch.equal(model(x), plain(x))
    assert [type(module) for module in model] == [type(module) for module in plain]


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_and_mix(kind, tmp_path):
    model, base = two_layers(kind)
    x = torch.randn(3, 64)
    base(x)  # 8 bits: the layer moves its tensors about in the first forward
    path = tmp_path / "a.safetensors"
    save_adapter(model, path)
    loaded = load_adapter(copy.deepcopy(base), path, name="a")
    assert torch.equal(loaded(x), model(x))
    attach(loaded, BlockLoRAConfig(rank=2), name="b")
    with mixed_adapters(loaded, ["b", None, "a"]):
        mixed = loaded(x)
    for row, name in enumerate(["b", None, "a"]):
        set_adapter(loaded, name)
        close(mixed[row], loaded(x)[row], 2e-2 if kind.startswith("int8") else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_another_quantised_weight_is_refused(kind, tmp_path):
    linear = nn.Linear(64, 32)
    path = tmp_path / "a.safetensors"
    save_adapter(
        attach(quantised(nn.Sequential(copy.deepcopy(linear)), kind), BlockLoRAConfig()), path
    )
    load_adapter(quantised(nn.Sequential(copy.deepcopy(linear)), kind), path)
    with torch.no_grad():
        linear.weight[0, 0] = 1.0
    with pytest.raises(ValueError, match="was trained on another base"):
        load_adapter(quantised(nn.Sequential(linear), kind), path)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_into_a_quantised_weight_is_refused(kind):
    model, _ = two_layers(kind)
    x = torch.randn(3, 64)
    before = model(x)
    with pytest.raises(ValueError, match="0: its weight is quantised, and merging would round"):
        merge(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_with_dropout(kind):
    model, _ = two_layers(kind, dropout=0.5)
    x = torch.randn(6, 64, requires_grad=True)

    def gradients(run):
        model.zero_grad()
        x.grad = None
        torch.manual_seed(2)
        run().square().sum().backward()
        return [x.grad.clone(), *[p.grad.clone() for p in model.parameters() if p.requires_grad]]

    whole = gradients(lambda: model(x))
    again = gradients(lambda: checkpoint(model, x, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_a_quantised_llama(kind):
    model = quantised(transformers_model("llama"), kind)
    inputs = inputs_of("llama")
    base = output_of(model, inputs)
    trained(attach(model, BlockLoRAConfig(rank=4)))
    layers = [m for m in model.modules() if isinstance(m, BlockLoRALayer)]
    assert len(layers) == 14
    output = output_of(model, inputs)
    assert not torch.allclose(output, base)
    output.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    set_adapter(model, None)
    assert torch.equal(output_of(model, inputs), base)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("torchao")])
def test_quantised_by_torchao_after_attaching(kind):
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    plain = KINDS[kind](copy.deepcopy(model[0]))
    trained(attach(model, BlockLoRAConfig(rank=4)))
    KINDS[kind](model[0])
    x = torch.randn(5, 64)
    close(model(x), PlainLayer(plain, model[0].adapter, {})(x), 1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8", "torchao-int4"])
def test_compile_whole(kind):
    torch._dynamo.reset()
    model, _ = two_layers(kind)
    x = torch.randn(5, 64, requires_grad=True)
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    close(output, model(x), 2e-2 if kind == "int8" else 1e-5)
    output.sum().backward()
    assert x.grad.isfinite().all()
