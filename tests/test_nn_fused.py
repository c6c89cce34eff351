"""The fused layers beside the same scales and shifts in plain modules; compiled, exported, cast."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nn_models import (
    OWN,
    disturbed,
    inputs_of,
    output_of,
    plain_scale_shift,
    saved_bytes,
    trained_gradients,
    transformers_model,
)
from partune.nn import ScaleShiftConfig, attach

FAMILIES = ["vit", "deit", "dinov2", "swin", "convnext", "ast", "clip", "llama", "gemma", "gpt2"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
# of bfloat16: the plain modules round between norm, scale and shift, each to 8 bits


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(got, wanted, tolerance, what, size=None):
    got, wanted = got.detach().double(), wanted.detach().double()
    error = float((got - wanted).abs().max())
    size = float((wanted if size is None else size.double()).abs().max())
    assert error <= tolerance * size, f"{what}: {error:g}, largest {size:g}"


def pair(kind, dtype=torch.float32, **options):
    """An adapted model, plain modules of the same values, and what runs both."""
    if kind in OWN:
        base, images = disturbed(OWN[kind]()).to(dtype), torch.randn(2, 3, 16, 16, dtype=dtype)

        def run(model):
            return model(images)
    else:
        base = transformers_model(kind).to(dtype)
        inputs = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in inputs_of(kind).items()
        }

        def run(model):
            return output_of(model, inputs)

    adapted = attach(copy.deepcopy(base), ScaleShiftConfig(init_std=0.2, **options))
    return adapted, plain_scale_shift(base, adapted), run


def assert_gradients_close(got, wanted, tolerance):
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient is not None and got[name] is not None, name
        # a shift of all keys doesn't change a softmax: its gradient is 0 but for rounding
        nothing = name.endswith("k_proj.shift")
        size = wanted[name.replace("k_proj", "v_proj")] if nothing else None
        assert_close(got[name], gradient, tolerance, name, size)


def assert_same_gradients(adapted, plain, run, tolerance):
    outputs = run(adapted), run(plain)
    assert_close(*outputs, tolerance, "output")
    for output in outputs:
        output.square().sum().backward()
    assert_gradients_close(trained_gradients(adapted), trained_gradients(plain), tolerance)
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [*FAMILIES, *OWN])
def test_gradients_are_those_of_plain_modules(kind, dtype):
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-4}[dtype]  # in float32: sums of sums
    assert_same_gradients(*pair(kind, dtype), tolerance)


@pytest.mark.parametrize("kind", ["vit", "convnext", "timm-convnext", "gpt2"])
def test_shift_everywhere(kind):
    assert_same_gradients(*pair(kind, torch.float64, shift=True), 1e-10)


def test_batch_norm_in_training_mode():
    adapted, plain, run = pair("convnet", torch.float64)
    adapted.train(), plain.train()
    assert_same_gradients(adapted, plain, run, 1e-10)
    adapted.eval(), plain.eval()
    assert_close(run(adapted), run(plain), 1e-10, "by the running statistics")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_through_a_whole_vit(dtype):
    """Twelve blocks of ViT-Tiny's width; float64, which takes long, on smaller images."""
    transformers = pytest.importorskip("transformers")
    size = {torch.float64: 64, torch.float32: 224}[dtype]
    config = transformers.ViTConfig(
        hidden_size=192,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=size,
        num_labels=10,
    )
    base = disturbed(transformers.ViTForImageClassification(config)).to(dtype)
    adapted = attach(copy.deepcopy(base), ScaleShiftConfig())
    images = {"pixel_values": torch.randn(2, 3, size, size, dtype=dtype)}
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    plain = plain_scale_shift(base, adapted)
    assert_same_gradients(adapted, plain, lambda model: output_of(model, images), tolerance)


def test_activation_memory_of_a_vit():
    """At 224 x 224 in the proportions of ViT-B: 0.75 of plain SSF's at most."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768)
    base = transformers.ViTModel(config, add_pooling_layer=False).requires_grad_(False)
    adapted = attach(copy.deepcopy(base), ScaleShiftConfig())
    plain = plain_scale_shift(base, adapted)
    images = torch.randn(1, 3, 224, 224)
    ours, theirs = (saved_bytes(model, lambda m=model: m(images)) for model in (adapted, plain))
    assert ours <= 0.75 * theirs, f"{ours / theirs:.3f} of plain SSF's"


@pytest.mark.parametrize("kind", ["vit", "convnext", "llama"])
def test_cast_to_bfloat16(kind):
    """Scales and shifts beside weights in bfloat16 are float32; a cast of the whole takes them."""
    adapted, _, run = pair(kind, torch.bfloat16)
    wide = copy.deepcopy(adapted).float()
    trained = [p for n, p in adapted.named_parameters() if ".scale_shift." in n]
    assert trained and all(parameter.dtype == torch.float32 for parameter in trained)
    narrow = copy.deepcopy(adapted).to(torch.bfloat16)
    reference = run_in_float32(wide, kind, run)
    for model in (adapted, narrow):
        output = run(model)
        assert output.dtype == torch.bfloat16
        assert_close(output, reference, 6e-2, "two layers in bfloat16")
        output.float().square().sum().backward()
        grads = trained_gradients(model)
        assert grads and all(gradient.isfinite().all() for gradient in grads.values())


def run_in_float32(model, kind, run):
    cells = dict(
        zip(run.__code__.co_freevars, (c.cell_contents for c in run.__closure__), strict=True)
    )
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in cells["inputs"].items()}
    return output_of(model, inputs)


@pytest.mark.parametrize("kind", ["vit", "convnext", "llama", "convnet"])
def test_autocast(kind):
    adapted, plain, run = pair(kind)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = run(adapted), run(plain)
    exact = run(plain)
    assert_close(got, exact, 3e-2, "as near as autocast allows")
    assert_close(wanted, exact, 3e-2, "and so are plain modules")
    got.float().square().sum().backward()
    assert all(g.isfinite().all() for g in trained_gradients(adapted).values())


def test_gradient_checkpointing():
    adapted, plain, run = pair("vit", torch.float64)
    adapted.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(adapted, plain.train(), run, 1e-10)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_block(use_reentrant):
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    block = attach(block.double(), ScaleShiftConfig())
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def gradients(output):
        tensors = {"x": x, **{n: p for n, p in block.named_parameters() if p.requires_grad}}
        for tensor in tensors.values():
            tensor.grad = None
        output.square().sum().backward()
        return {name: tensor.grad for name, tensor in tensors.items()}

    whole = gradients(block(x))
    again = gradients(checkpoint(block, x, use_reentrant=use_reentrant))
    assert all(torch.equal(again[name], gradient) for name, gradient in whole.items())


def test_nothing_is_written_without_gradients():
    """In place means the layer's own output: inputs and weights stay, with and without autograd."""
    adapted, _, run = pair("convnext")
    state = copy.deepcopy(adapted.state_dict())
    with_grad = run(adapted)
    with torch.no_grad():
        assert torch.equal(run(adapted), with_grad)
    with torch.inference_mode():
        assert torch.equal(run(adapted), with_grad)
    assert all(torch.equal(value, state[key]) for key, value in adapted.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 5, 2), (3, 6, 6)),  # no batch: 5 channels of 5 rows, so that both fit
        (nn.Conv1d(3, 5, 2), (3, 6)),
        (nn.Conv3d(3, 4, 2), (2, 3, 5, 5, 5)),
        (nn.Linear(3, 5), (3,)),
        (nn.Linear(3, 5), (0, 3)),
        (nn.LayerNorm(3), (2, 4, 3)),
        (nn.LayerNorm(3, elementwise_affine=False), (2, 3)),
        (nn.BatchNorm1d(3).eval(), (2, 3)),
        (nn.BatchNorm2d(3, momentum=None), (2, 3, 4, 4)),
        (nn.BatchNorm2d(3, affine=False, track_running_stats=False), (2, 3, 4, 4)),
        (nn.GroupNorm(3, 6, affine=False), (2, 6, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["contiguous", "transposed"])
def test_layers_and_shapes(layer, shape, order):
    base = nn.Sequential(copy.deepcopy(layer)).requires_grad_(False)
    adapted = attach(copy.deepcopy(base), ScaleShiftConfig(shift=True, init_std=0.2)).double()
    base = base.double()
    plain = plain_scale_shift(base, adapted)
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and len(shape) < layer.weight.dim():
        plain[0].dim = 0
    x = torch.randn(shape, dtype=torch.float64)
    if order == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    if x.numel():
        assert_same_gradients(adapted, plain, lambda model: model(x.clone()), 1e-10)
    else:
        assert adapted(x).shape == plain(x).shape


def test_channels_last_memory():
    base = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.Conv2d(6, 4, 1)).double()
    adapted = attach(copy.deepcopy(base), ScaleShiftConfig(init_std=0.2))
    adapted = adapted.to(memory_format=torch.channels_last)
    plain = plain_scale_shift(base, adapted)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert_same_gradients(adapted, plain, lambda model: model(x), 1e-10)


@pytest.mark.parametrize("kind", ["vit", "convnext", "llama"])
def test_export(kind):
    adapted, _, _ = pair(kind)
    adapted.config.use_cache = False  # a cache in the output can't be exported
    example = inputs_of(kind)
    exported = torch.export.export(adapted, (), example).module()
    assert_close(output_of(exported, example), output_of(adapted, example), 1e-5, "exported")


@pytest.mark.parametrize("kind", OWN)
def test_export_of_torchs_layers(kind):
    adapted = attach(disturbed(OWN[kind]()), ScaleShiftConfig(init_std=0.2))
    images = torch.randn(2, 3, 16, 16)
    exported = torch.export.export(adapted, (images,)).module()
    assert_close(exported(images), adapted(images), 1e-5, "exported")


@pytest.mark.parametrize("kind", ["vit", "convnext", "llama", "convnet"])
def test_compile_whole(kind):
    """fullgraph=True, backward included; the backend traces and runs what a compiler would get."""
    torch._dynamo.reset()
    adapted, plain, run = pair(kind)
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    output, wanted = run(compiled), run(plain)
    assert_close(output, wanted, 1e-5, "compiled")
    output.square().sum().backward()
    wanted.square().sum().backward()
    assert_gradients_close(trained_gradients(adapted), trained_gradients(plain), 2e-4)


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    base = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()).requires_grad_(False)
    adapted = attach(copy.deepcopy(base), ScaleShiftConfig(init_std=0.2))
    plain = plain_scale_shift(base, adapted)
    x = torch.randn(6, 8)
    output, wanted = torch.compile(adapted, fullgraph=True)(x), plain(x)
    assert_close(output, wanted, 1e-5, "compiled")
    output.square().sum().backward()
    wanted.square().sum().backward()
    assert_gradients_close(trained_gradients(adapted), trained_gradients(plain), 1e-5)
