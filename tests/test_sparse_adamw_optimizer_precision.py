"""16-bit weights, masters, bytes of state, GradScaler and skipped steps."""

import pytest
import torch
from torch.nn import Parameter

from partune.optim import SparseAdamW
from partune.selection import GradientMagnitude, Magnitude, Movement, Random

SIXTEEN_BIT = [torch.bfloat16, torch.float16]


def snapshot(optimizer):
    """Bytes of all weights and state."""
    values = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            values.append(p.detach().clone())
            for name, value in sorted(optimizer.state.get(p, {}).items()):
                values.append((name, value.clone() if isinstance(value, torch.Tensor) else value))
    return str(values), len(optimizer.state)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("master_weights", [None, True, False])
def test_updates_far_below_the_last_bit_still_move_weights(dtype, master_weights):
    weight = Parameter(torch.full((100, 100), 3.0, dtype=dtype))
    optimizer = SparseAdamW(
        [weight], lr=1e-4, weight_decay=0.0, selection=Random(), density=0.5,
        refresh_interval=None, master_weights=master_weights,
    )  # fmt: skip
    weight.grad = torch.ones_like(weight)
    for _ in range(200):
        optimizer.step()
    selected = optimizer.selected(weight)
    assert ("master" in optimizer.state[weight]) == (master_weights is not False)
    trained = optimizer.state[weight].get("master", weight[selected].float())
    assert trained.mean().item() == pytest.approx(3.0 - 200 * 1e-4, abs=1e-3)
    assert (weight[selected] != 3.0).any() and (weight[~selected] == 3.0).all()
    last_bit = 3.0 - torch.nextafter(torch.tensor(3.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    assert last_bit > 10 * 1e-4  # rounding to nearest would have moved nothing


def test_a_master_follows_the_float32_run():
    values = torch.randn(30, 40).to(torch.bfloat16)
    weight, wide = Parameter(values.clone()), Parameter(values.float())
    for p in (weight, wide):
        optimizer = SparseAdamW([p], lr=1e-3, selection=Magnitude(), density=0.3)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            p.grad = torch.randn(30, 40, generator=generator).to(torch.bfloat16).to(p.dtype)
            optimizer.step()
        if p is weight:
            master = optimizer.state[p]["master"]
    selected = optimizer.selected(wide)
    assert torch.allclose(master, wide[selected].detach(), rtol=0, atol=1e-6)
    assert (weight[selected] == master.to(torch.bfloat16)).all()


def test_a_refresh_takes_the_weight_as_master_of_new_entries():
    weight = Parameter(torch.randn(30, 40).to(torch.bfloat16))
    optimizer = SparseAdamW([weight], lr=1e-3, selection=Random(), density=0.3)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    optimizer.step()
    old = torch.full(weight.shape, float("nan"))
    old[optimizer.selected(weight)] = optimizer.state[weight]["master"]
    optimizer.select()
    new = optimizer.selected(weight)
    expected = torch.where(old.isnan(), weight.detach().float(), old)
    assert (optimizer.state[weight]["master"] == expected[new]).all()
    assert (old[new].isnan()).any() and (expected != weight.float()).any()


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "master_weights", "limit"),
    [
        (torch.float32, None, None, 13),
        (torch.bfloat16, None, False, 13),
        (torch.bfloat16, None, None, 17),
        (torch.float16, None, True, 17),
        (torch.bfloat16, torch.bfloat16, False, 9),
    ],
)
def test_bytes_of_state_per_selected_entry(dtype, state_dtype, master_weights, limit):
    weight = Parameter(torch.randn(512, 512).to(dtype))
    optimizer = SparseAdamW(
        [weight], selection=Magnitude(), state_dtype=state_dtype, master_weights=master_weights
    )
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    tensors = [v for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor)]
    state_bytes = sum(t.numel() * t.element_size() for t in tensors)
    assert state_bytes / optimizer.selected(weight).sum() <= limit


def test_bfloat16_moments_decay_on_average():
    weight = Parameter(torch.zeros(200, 200))
    optimizer = SparseAdamW(
        [weight], betas=(0.9, 0.999), selection=Random(), density=0.5, state_dtype=torch.bfloat16
    )
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.grad = torch.zeros_like(weight)
    for _ in range(100):
        optimizer.step()
    # Rounding to nearest would keep 0.001: its last bit is worth more than 0.1 % of it.
    exp_avg_sq = optimizer.state[weight]["exp_avg_sq"].double().mean().item()
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.bfloat16
    assert exp_avg_sq == pytest.approx(0.001 * 0.999**100, rel=5e-3)


def test_runs_with_the_same_seed_have_the_same_bits_and_others_not():
    results = []
    for seed in (1, 1, 2):
        weight = Parameter(torch.ones(50, 50, dtype=torch.bfloat16))
        optimizer = SparseAdamW(
            [weight], lr=1e-4, selection=Magnitude(), density=0.5, master_weights=False, seed=seed
        )
        weight.grad = torch.ones_like(weight)
        for _ in range(3):
            optimizer.step()
        results.append(weight.detach())
    assert (results[0] == results[1]).all() and (results[0] != results[2]).any()


@pytest.mark.parametrize("selection", [Magnitude(), Movement(), GradientMagnitude()])
def test_grad_scaler_unscales_and_skips(selection):
    def run(scaled):
        weight = Parameter(torch.arange(-6.0, 6.0).view(3, 4) / 7)
        optimizer = SparseAdamW([weight], lr=0.1, selection=selection, density=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for factor in (1.0, float("inf"), 3.0):
            if factor == float("inf") and not scaled:
                continue
            optimizer.zero_grad()
            scaler.scale((weight**2 * factor).sum()).backward()
            before = snapshot(optimizer)
            grad = weight.grad.clone()
            scaler.step(optimizer)
            scaler.update()
            assert (weight.grad.nan_to_num() == grad.nan_to_num()).all()
            if factor == float("inf"):
                assert snapshot(optimizer) == before
        return weight, optimizer

    (scaled, with_scaler), (plain, without) = run(True), run(False)
    assert torch.allclose(scaled, plain, rtol=0, atol=1e-6)
    assert with_scaler.state[scaled]["step"] == without.state[plain]["step"] == 2
    if isinstance(selection, Movement):
        sums = [
            o.state[p]["selection"]["movement"]
            for o, p in ((with_scaler, scaled), (without, plain))
        ]
        assert torch.allclose(*sums, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*compact state")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("steps_before", [0, 1, 2])
def test_skip_nonfinite_writes_nothing_at_all(bad, steps_before):
    good, poisoned, bias = (Parameter(torch.randn(shape)) for shape in ((8, 8), (8, 8), (8,)))
    groups = [{"params": [good, bias]}, {"params": [poisoned], "skip_nonfinite": True}]
    optimizer = SparseAdamW(groups, selection=Movement(), density=1.0, refresh_interval=2)
    for _ in range(steps_before):
        for p in (good, poisoned, bias):
            p.grad = torch.randn_like(p)
        optimizer.step()
    before = snapshot(optimizer)
    for p in (good, poisoned, bias):
        p.grad = torch.randn_like(p)
    poisoned.grad[3, 5] = bad
    optimizer.step()
    assert snapshot(optimizer) == before
    poisoned.grad[3, 5] = 1.0
    optimizer.step()
    assert optimizer.state[good]["step"] == steps_before + 1 and not good.isnan().any()


def test_skip_nonfinite_asks_for_selected_entries_only():
    weight = Parameter(torch.arange(1.0, 17.0).view(4, 4))
    optimizer = SparseAdamW([weight], selection=Magnitude(), density=0.25, skip_nonfinite=True)
    weight.grad = torch.ones_like(weight)
    weight.grad[0, 0] = float("nan")  # the smallest weight
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1 and not weight.isnan().any()


def test_without_skip_nonfinite_a_nan_is_the_users():
    weight = Parameter(torch.ones(4, 4))
    optimizer = SparseAdamW([weight], selection=Magnitude(), density=0.5)
    weight.grad = torch.full_like(weight, float("nan"))
    optimizer.step()
    assert weight.isnan().sum() == 8
