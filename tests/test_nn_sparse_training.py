"""Training sparse layers: as the optimizer route does, with any optimizer, on two ranks."""

import copy
import datetime
import os

import bitsandbytes
import pytest
import torch
from torch import nn

from nn_models import inputs_of, output_of, torchs_products, transformers_model
from partune.nn import Refresher, SparseConfig, attach, refresh
from partune.optim import SparseAdamW
from partune.selection import Magnitude, PrincipalWeights, Random
from sparse_layers import (
    Masked,
    Scattered,
    assert_written,
    mask_of,
    selected,
    sparse,
    sparse_layers,
    train,
    two_layers,
    values_of,
)


def assert_same_parameters(model, plain, tolerance):
    """Relative to each matrix's largest entry."""
    state = model.state_dict()
    for name, wanted in plain.state_dict().items():
        error = (state[name] - wanted).abs().max()
        assert error <= tolerance * wanted.abs().max(), f"{name}: {error:g}"


# ---- the optimizer route ----


def matrices(model):
    return [p for p in model.parameters() if p.dim() == 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_training_as_the_optimizer_route(dtype):
    plain = two_layers(dtype)
    model = copy.deepcopy(plain)
    for parameter in plain.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    options = dict(lr=3e-3, weight_decay=0.1)
    theirs = SparseAdamW(
        matrices(plain), selection=Scattered(), density=0.2, refresh_interval=None, **options
    )
    start = copy.deepcopy(plain.state_dict())
    sparse(model)
    train(plain, theirs, 50)
    train(model, torch.optim.AdamW(values_of(model), **options), 50)
    moved = (plain[0].weight - start["0.weight"]).abs()
    assert torch.equal(moved > 0, mask_of(model[0].adapter)) and moved.max() > 0.01
    assert_same_parameters(model, plain, 1e-5)
    assert_written(model)


@pytest.mark.parametrize(
    "selection", [PrincipalWeights(4), Magnitude(), Random(3)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("interval", [1, 7])
def test_same_training_with_refreshes(selection, interval):
    plain = two_layers(torch.float64)
    model = copy.deepcopy(plain)
    for parameter in plain.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    options = dict(lr=3e-3, weight_decay=0.1)
    theirs = SparseAdamW(
        matrices(plain), selection=selection, density=0.2, refresh_interval=interval, **options
    )
    attach(model, SparseConfig(selection, density=0.2))
    ours = torch.optim.AdamW(values_of(model), **options)
    refresher = Refresher(model, ours, interval)
    train(plain, theirs, 20)
    train(model, ours, 20, after=refresher.step)
    assert_same_parameters(model, plain, 1e-9)
    if 21 % interval:  # else ours has refreshed already for the step to come
        for layer, weight in zip(sparse_layers(model), matrices(plain), strict=True):
            assert torch.equal(mask_of(layer.adapter), theirs.selected(weight))


def test_bfloat16_weights_have_their_master():
    plain = two_layers(torch.bfloat16)
    model = copy.deepcopy(plain)
    for parameter in plain.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    options = dict(lr=1e-4, weight_decay=0.0)
    theirs = SparseAdamW(
        matrices(plain), selection=Scattered(), density=0.2, refresh_interval=None, **options
    )
    sparse(model)
    train(plain, theirs, 30)
    train(model, torch.optim.AdamW(values_of(model), **options), 30)
    for layer, weight in zip(sparse_layers(model), matrices(plain), strict=True):
        master = theirs.state[weight]["master"]
        moved = (master - selected(weight, layer.adapter).float()).abs()
        assert moved.max() > 0, "the master holds more than the weight"
        assert (layer.adapter.values - master).abs().max() <= 3e-4, "30 steps of 1e-4, rounded"
    assert_written(model)


# ---- optimizers ----

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.0, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.0, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.0, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=3e-3, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=3e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    plain = two_layers(torch.float64)
    model = sparse(copy.deepcopy(plain))
    masked = Masked(plain, model)
    train(plain, OPTIMIZERS[name](masked.parameters()), 10, between=masked.mask_gradients)
    train(model, OPTIMIZERS[name](values_of(model)), 10)
    assert_same_parameters(model, plain, 1e-10)
    assert_written(model)


def test_an_optimizer_that_evaluates_the_loss_again_says_so():
    model = sparse(two_layers())
    optimizer = torch.optim.LBFGS(values_of(model), max_iter=2)
    x = torch.randn(6, 24)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="changed since they were written into the weight"):
        optimizer.step(closure)


def test_a_compiled_step_writes_too():
    models = [sparse(two_layers()) for _ in range(2)]
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(values_of(model), lr=torch.tensor(0.1), foreach=True)
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        for _ in range(2):
            model(torch.ones(6, 24)).square().mean().backward()
            step()
            optimizer.zero_grad()
        assert_written(model)
    assert_same_parameters(models[1], models[0], 1e-6)


def test_weight_decay_shrinks_weights():
    model = sparse(two_layers())
    before = [layer.weight.detach().clone() for layer in sparse_layers(model)]
    for value in values_of(model):
        value.grad = torch.zeros_like(value)
    torch.optim.AdamW(values_of(model), lr=0.1, weight_decay=0.5).step()
    for layer, weight in zip(sparse_layers(model), before, strict=True):
        mask = mask_of(layer.adapter)
        assert torch.equal(layer.weight, torch.where(mask, weight * 0.95, weight))


@pytest.mark.parametrize("name", ["AdamW", "Adam8bit"])
def test_bitsandbytes(name):
    plain = two_layers()
    model = sparse(copy.deepcopy(plain))
    masked = Masked(plain, model)
    optimizer = getattr(bitsandbytes.optim, name)(values_of(model), lr=3e-3, weight_decay=0.0)
    train(model, optimizer, 10)
    torch_adamw = torch.optim.AdamW(masked.parameters(), lr=3e-3, weight_decay=0.0)
    train(plain, torch_adamw, 10, between=masked.mask_gradients)
    assert_same_parameters(model, plain, 1e-4)  # small vectors keep 32-bit state in Adam8bit, too
    assert_written(model)


def test_clipping_acts_on_selected_gradients():
    model = sparse(two_layers())
    model(torch.randn(6, 24)).square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert norm > 0.5
    clipped = torch.cat([v.grad for v in values_of(model)]).norm()
    assert abs(clipped - 0.5) < 1e-4


def test_grad_scaler():
    model = sparse(two_layers())
    optimizer = torch.optim.AdamW(values_of(model), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x = torch.randn(6, 24)

    def step(factor):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    before = [v.detach().clone() for v in values_of(model)]
    step(float("inf"))
    assert all(torch.equal(*pair) for pair in zip(values_of(model), before, strict=True))
    assert scaler.get_scale() == 2.0
    step(1.0)
    assert not any(torch.equal(*pair) for pair in zip(values_of(model), before, strict=True))
    assert_written(model)


def test_an_optimizer_of_something_else_writes_nothing():
    model = sparse(two_layers())
    with torch.no_grad():
        values_of(model)[0].add_(1.0)
    before = model[0].weight.detach().clone()
    other = nn.Linear(3, 3)
    other(torch.ones(3)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert torch.equal(model[0].weight, before)


# ---- refresh ----


def test_a_refresh_keeps_moments_where_selections_meet():
    model = two_layers()
    attach(model, SparseConfig(Magnitude(), density=0.2))
    optimizer = torch.optim.AdamW(values_of(model), lr=0.1)
    train(model, optimizer, 5)
    model(torch.randn(6, 24)).square().sum().backward()
    layer = model[2]
    entries = layer.adapter
    old = mask_of(entries)
    dense = {}
    state = optimizer.state[entries.values]
    follow = {"grad": entries.values.grad, **{k: v for k, v in state.items() if v.dim() == 1}}
    assert set(follow) == {"grad", "exp_avg", "exp_avg_sq"}
    for name, value in follow.items():
        dense[name] = torch.zeros_like(layer.weight)
        dense[name][old] = value
    weight = layer.weight.detach().clone()
    share = refresh(model, optimizer)
    new = mask_of(entries)
    assert 0.0 < share < 1.0 and not torch.equal(old, new)
    assert torch.equal(layer.weight, weight), "deselected weights keep their trained value"
    assert torch.equal(entries.values, weight[new])
    assert torch.equal(weight[new].abs().sort().values[:1], weight.abs()[new].min()[None])
    assert weight.abs()[new].min() >= weight.abs()[~new].max()
    for name, value in follow.items():
        assert torch.equal(value, torch.where(old & new, dense[name], 0.0)[new]), name
        assert value.any()
    assert float(state["step"]) == 5
    train(model, optimizer, 5)
    assert_written(model)


def test_a_refresh_keeps_the_master_of_16_bit_weights():
    model = two_layers(torch.bfloat16)
    attach(model, SparseConfig(Magnitude(), density=0.2))
    optimizer = torch.optim.AdamW(values_of(model), lr=1e-3)
    train(model, optimizer, 5)
    entries = model[0].adapter
    old, master = mask_of(entries), torch.zeros(33, 24)
    master[old] = entries.values.detach()
    refresh(model, optimizer)
    new = mask_of(entries)
    weight = model[0].weight.detach().float()
    assert torch.equal(entries.values.detach(), torch.where(old, master, weight)[new])
    assert not torch.equal(master[old & new], weight[old & new])


def test_refresh_with_another_selection():
    model = sparse(two_layers())
    optimizer = torch.optim.SGD(values_of(model), lr=0.1)
    refresh(model, optimizer, selection=Magnitude())
    mask, size = mask_of(model[0].adapter), model[0].weight.abs()
    assert size[mask].min() >= size[~mask].max()
    assert model[0].adapter.selection == Magnitude()


def test_refresher_remembers_its_count():
    model = sparse(two_layers())
    optimizer = torch.optim.SGD(values_of(model), lr=0.1)
    first, second = (Refresher(model, optimizer, interval) for interval in (3, 5))
    for _ in range(4):
        first.step()
    second.load_state_dict(first.state_dict())
    assert (second.steps, second.interval) == (4, 3)


def test_trainer_refreshes(tmp_path):
    from transformers import Trainer, TrainingArguments

    from partune.integrations.transformers import RefreshCallback

    torch.manual_seed(0)
    model = transformers_model("llama")
    attach(model, SparseConfig(Scattered(), density=0.2))
    asked = []

    class Spy(Magnitude):
        def propose(self, weight, grad, state):
            asked.append(state["step"])
            return super().propose(weight, grad, state)

    for layer in sparse_layers(model):
        layer.adapter.selection = Spy()
    rows = [{"input_ids": torch.randint(3, 50, (6,))} for _ in range(10)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    arguments = TrainingArguments(
        tmp_path, max_steps=7, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    callbacks = [RefreshCallback(interval=3)]
    Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
    assert sorted(set(asked)) == [3, 6] and len(asked) == 2 * len(sparse_layers(model))
    assert_written(model)


def test_what_save_pretrained_writes_is_trained(tmp_path):
    torch.manual_seed(0)
    model, inputs = transformers_model("llama"), inputs_of("llama")
    attach(model, SparseConfig(Magnitude(), density=0.2))
    output_of(model, inputs).square().sum().backward()
    torch.optim.AdamW(values_of(model), lr=0.05).step()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torchs_products():
        assert torch.equal(output_of(again, inputs), output_of(model, inputs))


# ---- two ranks ----


def _rank(rank, folder, wanted):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    model = two_layers(torch.float64)
    attach(model, SparseConfig(Magnitude(), density=0.2))
    shared = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(values_of(model), lr=0.01)
    refresher = Refresher(model, optimizer, 3)
    for x in _batches():
        halves = x.chunk(2)[rank].chunk(2)
        with shared.no_sync():
            shared(halves[0]).square().mean().div(2).backward()
        shared(halves[1]).square().mean().div(2).backward()
        optimizer.step()
        optimizer.zero_grad()
        refresher.step()
    assert_written(model)
    assert_same_parameters(model, wanted, 1e-10)
    dist.barrier()
    # Not by freeing torch's reducer: it waits for gloo's threads with the interpreter's lock held,
    # and they may be waiting for that (seen to hang).
    os._exit(0)


def _batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(8, 24, generator=generator, dtype=torch.float64) for _ in range(6)]


def test_two_ranks(tmp_path):
    model = two_layers(torch.float64)
    attach(model, SparseConfig(Magnitude(), density=0.2))
    optimizer = torch.optim.AdamW(values_of(model), lr=0.01)
    refresher = Refresher(model, optimizer, 3)
    for x in _batches():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        refresher.step()
    torch.multiprocessing.spawn(_rank, (str(tmp_path), model), nprocs=2)


def test_sharded_layers_say_so(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        model = fully_shard(sparse(two_layers()), mesh=mesh)
        with pytest.raises(RuntimeError, match=r"replaced the layer's own .as FSDP or functional"):
            model(torch.randn(6, 24))
        model = fully_shard(two_layers(), mesh=mesh)
        with pytest.raises(TypeError, match="0: got a weight that is a DTensor, want a strided"):
            sparse(model)
    finally:
        dist.destroy_process_group()
