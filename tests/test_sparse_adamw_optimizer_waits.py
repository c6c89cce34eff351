"""A step on a device: the host reads nothing back, and counts as if it had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from partune.optim import SparseAdamW, _update
from partune.selection import GradientMagnitude, Magnitude, Random


@pytest.mark.parametrize("lr_device", [None, "cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_selects_nothing_reads_nothing(
    lr_device: str | None, dtype: torch.dtype, scaled: bool
) -> None:
    """On a device without data, where reading a number, or copying one to the CPU, raises."""
    weight = Parameter(torch.empty(64, 32, device="meta", dtype=dtype))
    bias = Parameter(torch.empty(64, device="meta", dtype=dtype))
    optimizer = SparseAdamW(
        [weight, bias], lr=0.1, selection=Magnitude(), skip_nonfinite=True, refresh_interval=3,
        master_weights=False,
    )  # fmt: skip
    weight.grad, bias.grad = torch.empty_like(weight), torch.empty_like(bias)
    if lr_device:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device=lr_device)
    if scaled:
        optimizer.found_inf = torch.empty((), device="meta")
        optimizer.grad_scale = torch.empty((), device="meta")
    optimizer.state[weight].update(
        crow_indices=torch.empty(65, dtype=torch.int64, device="meta"),
        col_indices=torch.empty(102, dtype=torch.int32, device="meta"),
        exp_avg=torch.empty(102, device="meta"),
        exp_avg_sq=torch.empty(102, device="meta"),
        step=torch.empty((), device="meta"),
        parameter_id=0,
        selection={"step": 3, "parameter_id": 0},
    )
    optimizer.step()
    assert optimizer.state[weight]["selection"]["step"] == 4


def run(
    monkeypatch: pytest.MonkeyPatch, waits: bool, selection: Any, scaler: bool
) -> tuple[Tensor, SparseAdamW]:
    """Twenty steps, every third of which overflows; `waits` as on a device."""
    if waits:
        monkeypatch.setattr(_update, "reads_at_once", lambda device: False)
    generator = torch.Generator().manual_seed(0)
    weight = Parameter(torch.randn(16, 12, generator=generator))
    bias = Parameter(torch.randn(5, generator=generator))
    optimizer = SparseAdamW(
        [weight, bias], lr=0.1, selection=selection, density=0.3, refresh_interval=4,
        skip_nonfinite=not scaler,
    )  # fmt: skip
    for step in range(20):
        overflow = step % 3 == 1
        for p in (weight, bias):
            p.grad = torch.randn(p.shape, generator=generator)
        if overflow:
            bias.grad[2] = float("inf")
        if scaler:
            optimizer.found_inf = torch.tensor(float(overflow))
            optimizer.grad_scale = torch.tensor(2.0)
        optimizer.step()
    monkeypatch.undo()
    return weight.detach(), optimizer


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("selection", [Magnitude(), Random(3), GradientMagnitude()], ids=str)
def test_steps_left_out_on_a_device_are_never_counted(
    monkeypatch: pytest.MonkeyPatch, selection: Any, scaler: bool
) -> None:
    """Refreshes come at the same step numbers, and everything ends in the same bits."""
    at_once, waited = (run(monkeypatch, waits, selection, scaler) for waits in (False, True))
    assert torch.equal(at_once[0], waited[0])
    for mine, theirs in zip(at_once[1].state.values(), waited[1].state.values(), strict=True):
        assert mine["step"] == theirs["step"] == 13
        for key in ("crow_indices", "col_indices", "exp_avg", "exp_avg_sq"):
            if key in mine:
                assert torch.equal(mine[key], theirs[key])
