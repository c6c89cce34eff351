"""Block-LoRA in training with dropout, checkpointed, compiled, exported, cast and sharded."""

import copy

import pytest
import torch
import torch.distributed.fsdp
from torch import nn
from torch.utils.checkpoint import checkpoint

from block_lora_layers import (
    SMALL,
    assert_close,
    model_and_output,
    pair,
    relative,
    trained,
)
from nn_models import inputs_of, output_of, saved_bytes
from partune.nn import (
    BlockLoRA,
    BlockLoRAConfig,
    BlockLoRALinear,
    attach,
    detach,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- dropout ----


def test_dropout_is_of_the_input_before_its_chunks_are_summed():
    """With as many chunks as features and all factors 1, the product counts the kept ones."""
    layer = BlockLoRALinear(64, 1, bias=False, rank=1, blocks=64, dropout=0.25)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
        layer.weight.zero_()
    kept = layer(torch.ones(2000, 64)) * 0.75
    assert torch.allclose(kept, kept.round(), atol=1e-3)
    assert 47.5 < kept.mean().item() < 48.5, "three quarters of 64"
    assert float(kept.std()) > 2, "each row and feature is drawn for itself"
    assert torch.equal(layer.eval()(torch.ones(3, 64)), torch.full((3, 1), 64.0))


def test_each_call_draws_a_mask_of_its_own_by_torchs_generator():
    layer = trained(BlockLoRALinear(24, 10, dropout=0.5))
    x = torch.randn(6, 24)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and torch.equal(layer(x), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_has_the_mask_of_the_first(use_reentrant):
    model = nn.Sequential(*[trained(BlockLoRALinear(16, 16, dropout=0.5)) for _ in range(3)])
    x = torch.randn(6, 16, requires_grad=True)

    def gradients(run):
        model.zero_grad()
        x.grad = None
        torch.manual_seed(2)
        run().square().sum().backward()
        return [x.grad.clone(), *[p.grad.clone() for p in model.parameters() if p.requires_grad]]

    whole = gradients(lambda: model(x))
    again = gradients(lambda: checkpoint(model, x, use_reentrant=use_reentrant))
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    torch.manual_seed(3)
    other = model(x)
    torch.manual_seed(2)
    assert not torch.equal(model(x), other)


def test_gradients_under_dropout_are_those_of_the_mask():
    """The output is linear in x while the mask stays, so its gradient is that of any x."""
    layer = trained(BlockLoRALinear(24, 10, dropout=0.5, dtype=torch.float64))
    x = torch.randn(6, 24, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(6, 10, dtype=torch.float64)
    torch.manual_seed(1)
    (layer(x) * direction).sum().backward()
    step = torch.randn_like(x)
    with torch.no_grad():
        torch.manual_seed(1)
        start = (layer(x) * direction).sum()
        torch.manual_seed(1)
        end = (layer(x + step) * direction).sum()
    torch.testing.assert_close((x.grad * step).sum(), end - start)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_nothing_of_tokens_times_features_is_saved_but_x(dropout):
    layer = trained(BlockLoRALinear(512, 512, dropout=dropout))
    x = torch.randn(256, 512)
    assert saved_bytes(layer, lambda: layer(x)) <= x.nbytes + 256 * 8 * 4 + 4096


# ---- layers that are compiled, exported, cast ----


@pytest.mark.parametrize("options", [dict(), dict(share="rank"), dict(dropout=0.5)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_compile_whole(options, training):
    torch._dynamo.reset()
    model = nn.Sequential(trained(BlockLoRALinear(24, 10, **options)), nn.GELU()).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        x = torch.linspace(-1, 1, 72).view(3, 24).requires_grad_()
        torch.manual_seed(4)
        output = run(x)
        output.square().sum().backward()
        results.append([output, x.grad, *[p.grad for p in model.parameters() if p.requires_grad]])
    if training and options.get("dropout"):
        assert all(value.isfinite().all() for value in results[1])
        assert not torch.equal(compiled(x), compiled(x)), "each call draws a mask of its own"
        return
    for ours, theirs in zip(*results, strict=True):
        assert_close(theirs, ours, 1e-5, "compiled")


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    layer, plain, ours, theirs = pair(torch.float32, {})
    compiled = torch.compile(layer, fullgraph=True)
    output, wanted = compiled(ours), plain(theirs)
    assert_close(output, wanted, 1e-5, "compiled")
    output.square().sum().backward()
    wanted.square().sum().backward()
    assert_close(ours.grad, theirs.grad, 1e-5, "input's gradient")
    assert_close(layer.adapter.up.grad, plain.adapter.up.grad, 1e-5, "up")


@pytest.mark.parametrize("options", [dict(), dict(share="rank")], ids=str)
def test_export(options):
    model = nn.Sequential(trained(BlockLoRALinear(24, 10, **options))).eval()
    x = torch.randn(3, 24)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    assert_close(exported(x), model(x), 1e-5, "exported")
    more = torch.randn(7, 24)
    assert_close(exported(more), model(more), 1e-5, "another batch")


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training):
    layer = trained(BlockLoRALinear(24, 10)).train(training)
    x = torch.randn(5, 24, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    assert_close(output, exact, 2e-2, "in bfloat16")
    output.float().sum().backward()
    assert x.grad.dtype == torch.float32 and layer.adapter.up.grad.dtype == torch.float32
    assert layer.adapter.up.grad.isfinite().all() and layer.adapter.up.grad.abs().max() > 0


def test_without_autograd():
    layer, x = trained(BlockLoRALinear(24, 10)), torch.randn(5, 24)
    with_grad, state = layer(x), copy.deepcopy(layer.state_dict())
    before = x.clone()
    with torch.no_grad():
        assert torch.equal(layer(x), with_grad)
    with torch.inference_mode():
        assert torch.equal(layer(x), with_grad)
    assert torch.equal(x, before)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


# ---- whole models ----


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
def test_compile_whole_models(kind):
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
def test_export_models(kind):
    model, _ = model_and_output(kind)
    trained(attach(model, BlockLoRAConfig(**SMALL)))
    model.config.use_cache = False  # a cache in the output can't be exported
    example = inputs_of(kind)
    exported = torch.export.export(model, (), example).module()
    assert relative(output_of(exported, example), output_of(model, example)) <= 1e-5


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_fully_sharded(one_process):
    """FSDP2 gathers a block's tensors for its forward; of one process here, each whole."""
    model = nn.Sequential(
        nn.Sequential(nn.Linear(16, 16), nn.GELU()), nn.Sequential(nn.Linear(16, 8))
    )
    trained(attach(model, BlockLoRAConfig(**SMALL)))
    whole = copy.deepcopy(model)
    for module in (*model, model):
        torch.distributed.fsdp.fully_shard(module, mesh=one_process)
    x = torch.randn(4, 16)
    got, wanted = model(x), whole(x)
    torch.testing.assert_close(got, wanted)
    got.square().sum().backward()
    wanted.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 4
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.full_tensor(), whole.get_parameter(name).grad)


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
