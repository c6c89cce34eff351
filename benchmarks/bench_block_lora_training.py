"""A training step of Block-LoRA beside peft's LoRA, both over the frozen model.

Every model is differentiated for its input embeddings, so that all go back through the same
products and adapters are what differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import accumulate

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile
from training_steps import MODELS, make

from conftest import SHARE_OF_BAR, Comparison
from partune.nn import BlockLoRAConfig, attach

RANK = 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FROZEN, PEFT = "the frozen model", "peft's LoRA"
HAS_BARS = SHARE_OF_BAR == 1


class Training:
    """A model whose adapters train; a call is one step."""

    def __init__(self, model: nn.Module, shape: tuple[int, int], vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = model
        self.tokens = torch.randint(0, vocabulary, shape, generator=generator)
        self.inputs = model.get_input_embeddings()(self.tokens).detach().requires_grad_()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def forward(self) -> Tensor:
        return self.model(inputs_embeds=self.inputs, labels=self.tokens).loss

    def __call__(self) -> None:
        self.forward().backward()
        self.inputs.grad = None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.fixture(params=[1, 2], ids=["lora", "two_blocks"])
def models(request: pytest.FixtureRequest) -> dict[str, Training]:
    sizes, shape = MODELS["llama_47m"]
    base = make("llama_47m").requires_grad_(False)
    ours = BlockLoRAConfig(rank=RANK, blocks=request.param, target_modules=LINEARS)
    pefts = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS)

    def training(adapted: Callable[[nn.Module], nn.Module]) -> Training:
        return Training(adapted(copy.deepcopy(base)), shape, sizes["vocab_size"])

    return {
        "ours": training(lambda model: attach(model, ours)),
        FROZEN: training(lambda model: model),
        PEFT: training(lambda model: peft.get_peft_model(model, pefts)),
    }


def test_training_step(report, note, request, models) -> None:
    """At most half of what peft's adapters add to the frozen model's step."""
    comparison = Comparison(models, rounds=7)
    ours, pefts = (comparison.ratio(FROZEN, name) - 1 for name in ("ours", PEFT))
    note(f"{request.node.name}: {ours:+.1%} over the frozen model, peft {pefts:+.1%}")
    report(comparison, {PEFT: 1.0 if HAS_BARS else 0.0}, rounds=1)
    assert not HAS_BARS or ours <= pefts / 2


def peak_bytes(step: Callable[[], None]) -> int:
    """The most that a step holds at once beyond what was there before it."""
    step()  # makes the optimizer's state
    with profile(profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


def test_peak_memory(note, request, models) -> None:
    peak = {name: peak_bytes(step) / 2**20 for name, step in models.items()}
    note(f"{request.node.name}, MiB: " + ", ".join(f"{n} {size:.0f}" for n, size in peak.items()))
    assert peak["ours"] < peak[PEFT]
