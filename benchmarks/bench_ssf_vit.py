"""A step of ViT-B/16 with SSF at every site, beside eager SSF and the frozen model without SSF."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from bench_sparse_adamw import SHARE_OF_BAR
from torch import nn

from conftest import Comparison
from nn_models import plain_scale_shift, saved_bytes
from partune.nn import ScaleShiftConfig, attach

BATCH = 16
ROUNDS = 11  # of seconds each; with three, products alone differ by more than the bar leaves


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """ViT-B/16 with random weights, as no figure here depends on them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=100))
    ours = attach(copy.deepcopy(base), ScaleShiftConfig())
    return {
        "ours": ours,
        "eager SSF": plain_scale_shift(base, ours),
        "frozen model": base.requires_grad_(False),
    }


def forward_of(model: nn.Module) -> Callable[[], torch.Tensor]:
    """The loss on a batch; where nothing trains, the images are what is differentiated for."""
    images = torch.randn(BATCH, 3, 224, 224)
    labels = torch.arange(BATCH) % 100
    images.requires_grad_(not any(p.requires_grad for p in model.parameters()))
    return lambda: nn.functional.cross_entropy(model(pixel_values=images).logits, labels)


def step_of(model: nn.Module) -> Callable[[], None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0) if trained else None
    forward = forward_of(model)

    def step() -> None:
        forward().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def test_step_of_vit_base(report, models) -> None:
    """Within 10 % of the frozen model, whose own backward has no choice but the products."""
    functions = {name: step_of(model) for name, model in models.items()}
    bars = {"eager SSF": 1.10 * SHARE_OF_BAR, "frozen model": 0.91 * SHARE_OF_BAR}
    report(Comparison(functions, rounds=ROUNDS), bars, rounds=1)


def test_activation_memory_of_vit_base(models) -> None:
    kept = {name: saved_bytes(model, forward_of(model)) for name, model in models.items()}
    shares = {name: kept["ours"] / size for name, size in kept.items()}
    print({name: f"{size / 2**20:.0f} MiB" for name, size in kept.items()})
    assert shares["eager SSF"] <= 0.75, shares
