"""Block-LoRA layers: parameters, forward and gradients beside plain torch, conversions."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed.fsdp
from torch import nn

from block_lora_layers import (
    assert_close,
    pair,
    plain_product,
    trained,
)
from partune.nn import (
    BlockLoRA,
    BlockLoRAConfig,
    BlockLoRALinear,
    attach,
    trainable_parameters,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
# of bfloat16: the plain product rounds between its two products as well, each to 8 bits
OPTIONS = [
    dict(),
    dict(blocks=1),
    dict(rank=3, blocks=4, alpha=6.0),
    dict(rank=12, blocks=6, scaling="rslora"),
    dict(share="rank"),
    dict(rank=6, blocks=3, share="rank", alpha=1.0, scaling="rslora"),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- parameters ----


@pytest.mark.parametrize("share", ["input", "rank"])
@pytest.mark.parametrize(("rank", "blocks"), [(8, 1), (8, 2), (8, 8), (16, 4)])
def test_parameters(share, rank, blocks):
    factors = BlockLoRA(64, 40, rank=rank, blocks=blocks, share=share)
    assert sum(p.numel() for p in factors.parameters()) == 64 * rank // blocks + rank * 40
    assert factors.up.eq(0).all() and factors.down.ne(0).all()
    bound = 1 / math.sqrt(factors.down.shape[1])  # of kaiming-uniform with a = √5
    assert 0.9 * bound < float(factors.down.detach().abs().max()) <= bound
    assert factors.scale == 1.0


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        (dict(rank=4, alpha=2.0), 0.5),
        (dict(rank=4, alpha=2.0, scaling="rslora"), 1.0),
        (dict(rank=4, scaling="rslora"), 2.0),
    ],
)
def test_scale(options, scale):
    assert BlockLoRA(8, 8, **options).scale == scale


def test_parameters_of_clips_encoders():
    """CLIP ViT-B/16, as CLIP-LoRA sets it: q, k, v of both encoders, rank 2, eight blocks."""
    transformers = pytest.importorskip("transformers")
    vision = dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        patch_size=16,
    )  # fmt: skip
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision)).half()
    total = sum(p.numel() for p in model.parameters())
    config = BlockLoRAConfig(
        rank=2, blocks=8, target_modules=["q_proj", "k_proj", "v_proj"], alpha=1.0, dropout=0.25,
        scaling="rslora",
    )  # fmt: skip
    attach(model, config)
    assert trainable_parameters(model) == (103_680, total + 103_680)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# ---- forward and gradients ----


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forward_and_gradients(dtype, options):
    layer, plain, ours, theirs = pair(dtype, options)
    got, wanted = layer(ours), plain(theirs)
    assert got.dtype == dtype
    assert_close(got, wanted, TOLERANCE[dtype], "output")
    direction = torch.randn_like(wanted)
    got.backward(direction)
    wanted.backward(direction)
    assert_close(ours.grad, theirs.grad, TOLERANCE[dtype], "input's gradient")
    for name, parameter in plain.adapter.named_parameters():
        own = layer.adapter.get_parameter(name)
        assert own.grad.dtype == own.dtype == parameter.dtype
        assert_close(own.grad, parameter.grad, TOLERANCE[dtype], name)
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 2), (0,), (2, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_shapes(shape, bias):
    layer, plain, ours, theirs = pair(torch.float64, {}, shape, bias)
    got, wanted = layer(ours), plain(theirs)
    assert got.shape == (*shape, 10)
    got.sum().backward()
    wanted.sum().backward()
    assert ours.grad.shape == ours.shape
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name, parameter in plain.adapter.named_parameters():
        torch.testing.assert_close(layer.adapter.get_parameter(name).grad, parameter.grad)


def test_inputs_that_are_not_contiguous():
    layer, plain, _, _ = pair(torch.float64, {})
    x = torch.randn(24, 7, 3, dtype=torch.float64).permute(2, 1, 0)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer(x[:, ::2]), plain(x[:, ::2]))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options):
    layer = trained(BlockLoRALinear(12, 5, dtype=torch.float64, **options))
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    values = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("trained_factors", [("down", "up"), ("down",), ("up",), ()])
def test_gradients_that_are_wanted(input_grad, trained_factors):
    layer, plain, ours, theirs = pair(torch.float64, {})
    for module, x in ((layer, ours), (plain, theirs)):
        x.requires_grad_(input_grad)
        for name, parameter in module.adapter.named_parameters():
            parameter.requires_grad_(name in trained_factors)
        output = module(x)
        assert output.requires_grad == (input_grad or bool(trained_factors))
        if output.requires_grad:
            output.square().sum().backward()
    assert (ours.grad is not None) == input_grad
    if input_grad:
        torch.testing.assert_close(ours.grad, theirs.grad)
    for name, parameter in plain.adapter.named_parameters():
        own = layer.adapter.get_parameter(name).grad
        assert (own is not None) == (name in trained_factors)
        if own is not None:
            torch.testing.assert_close(own, parameter.grad)


@pytest.mark.parametrize("trains", [("weight", "bias"), ("weight",), ("bias",)], ids=str)
@pytest.mark.parametrize("shape", [(3,), (3, 5)], ids=str)
def test_a_weight_or_bias_that_trains_gets_its_gradient_too(shape, trains):
    layer, plain, ours, theirs = pair(torch.float64, {}, shape)
    for base in (layer, plain.layer):
        for name in trains:
            base.get_parameter(name).requires_grad_(True)
    layer(ours).square().sum().backward()
    plain(theirs).square().sum().backward()
    for name in ("weight", "bias"):
        own, other = layer.get_parameter(name).grad, plain.layer.get_parameter(name).grad
        assert (own is not None) == (name in trains)
        if own is not None:
            torch.testing.assert_close(own, other)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(layer.adapter.up.grad, plain.adapter.up.grad)


def test_the_start_is_the_identity():
    base = nn.Linear(24, 10)
    layer = BlockLoRALinear.from_linear(base)
    x = torch.randn(5, 24)
    assert torch.equal(layer(x), base(x))


def test_arms_that_share_the_rank_stay_equal():
    """Why share="rank" is LoRA of rank/blocks: all arms get the same gradient."""
    layer = BlockLoRALinear(24, 10, rank=6, blocks=3, share="rank")
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(32, 24), torch.randn(32, 10)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), target).backward()
        optimizer.step()
    arms = layer.adapter.up
    assert arms.abs().max() > 1e-3
    assert torch.equal(arms[0], arms[1]) and torch.equal(arms[0], arms[2])
    assert torch.linalg.matrix_rank(layer.adapter.delta()) == 6 // 3


# ---- conversions ----


def test_from_linear_and_back():
    linear = nn.Linear(24, 10).eval()
    layer = BlockLoRALinear.from_linear(linear, rank=4, blocks=4, dropout=0.5)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert not layer.adapter.training
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "block_lora.default.down", "block_lora.default.up",
    ]  # fmt: skip
    keys = list(linear.state_dict())
    assert list(layer.state_dict())[:2] == keys
    x, weight = torch.randn(5, 24), linear.weight.detach().clone()
    trained(layer)
    plain = layer.to_linear()
    assert type(plain) is nn.Linear and plain.weight.requires_grad
    assert_close(plain(x), layer(x), 1e-5, "merged")
    assert torch.equal(linear.weight, weight), "the original stays"
    assert not torch.allclose(plain.weight, weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_conversions_keep_dtypes(dtype):
    layer = trained(
        BlockLoRALinear.from_linear(nn.Linear(8, 4, False, dtype=dtype), share="rank", alpha=4.0)
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {parameter.dtype for parameter in layer.adapter.parameters()} == {wide}
    plain = layer.to_linear()
    assert plain.bias is None and plain.weight.dtype == dtype
    factors = layer.adapter
    update = factors.scale * sum(arm @ factors.down for arm in factors.up)
    eps = torch.finfo(dtype).eps  # merged in `wide` and rounded once
    wanted = (layer.weight.to(wide) + update).to(dtype)
    torch.testing.assert_close(plain.weight, wanted, rtol=eps, atol=4 * torch.finfo(wide).eps)


def test_a_cast_of_the_whole_takes_the_factors():
    layer = trained(BlockLoRALinear(24, 10)).bfloat16()
    assert layer.adapter.down.dtype == torch.bfloat16
    x = torch.randn(5, 24).bfloat16()
    wide = copy.deepcopy(layer).float()
    output = layer(x)
    assert_close(output, wide(x.float()), 2e-2, "in bfloat16")
    output.float().sum().backward()
    assert layer.adapter.down.grad.dtype == torch.bfloat16


def test_the_product_by_hand():
    factors = trained(BlockLoRA(24, 10, blocks=4, dtype=torch.float64))
    x, base = torch.randn(5, 24, dtype=torch.float64), torch.randn(5, 10, dtype=torch.float64)
    before = base.clone()
    torch.testing.assert_close(factors(x, base), base + plain_product(x, factors))
    assert torch.equal(base, before)
    torch.testing.assert_close(x @ factors.delta().t(), plain_product(x, factors).detach())
    assert repr(factors) == "BlockLoRA(rank=8, blocks=4, share='input', scale=1)"


def test_copies_pickles_and_state_dicts():
    layer, x = trained(BlockLoRALinear(24, 10, rank=4)), torch.randn(5, 24)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is BlockLoRALinear and torch.equal(other(x), layer(x))
    other = BlockLoRALinear(24, 10, rank=4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
