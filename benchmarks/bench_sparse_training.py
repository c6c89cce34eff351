"""A training step of sparse layers beside full fine-tuning, peft's LoRA and peft's SHiRA.

All linear layers of the decoder, 5 %, selected anew every 200 steps. One test is one model and one
peer, below a minute and a half on two cores.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from training_steps import MODELS, PARTS, TrainingStep, make, make_mixture
from transformers import LlamaForCausalLM

from conftest import SHARE_OF_BAR, Comparison
from partune.nn import SparseConfig, attach, refresh
from partune.nn._sparse_layers import SparseLayer

# A step of ours takes at most these shares of the others'.
BARS = {"full": 0.73, "lora": 0.95, "shira": 0.73}
DENSITY, INTERVAL = 0.05, 200
ROUNDS = 5


def lora_config() -> peft.LoraConfig:
    return peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


def shira_config(model: LlamaForCausalLM) -> peft.ShiraConfig:
    """As many entries as ours selects, in SHiRA's unit: rank·(rows + columns) of each matrix."""
    shapes = [m.weight.shape for m in model.model.modules() if isinstance(m, nn.Linear)]
    selected = sum(math.floor(DENSITY * math.prod(shape)) for shape in shapes)
    rank = selected // sum(sum(shape) for shape in shapes)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.ShiraConfig(r=rank, target_modules=targets, random_seed=0, task_type="CAUSAL_LM")


class Training(TrainingStep):
    """Full fine-tuning, or some way around it."""

    def __init__(self, name: str, way: str) -> None:
        model = make(name)
        self.own_memory = resident("VmRSS")
        self.own_bytes = sum(p.nbytes for p in model.parameters())
        if way == "frozen":  # forward and the gradient of the inputs: what nobody can do without
            model.requires_grad_(False).enable_input_require_grads()
        elif way == "ours":
            model = attach(model, SparseConfig(density=DENSITY))
        elif way != "full":
            config = lora_config() if way == "lora" else shira_config(model)
            model = peft.get_peft_model(model, config)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in parameters)
        parameters = parameters or [nn.Parameter(torch.zeros(1))]
        super().__init__(name, model.train(), torch.optim.AdamW(parameters, lr=1e-5, fused=True))

    def refresh(self) -> float:
        """Milliseconds."""
        start = time.perf_counter()
        refresh(self.model, self.optimizer)
        return 1e3 * (time.perf_counter() - start)


@pytest.mark.parametrize("peer", BARS)
@pytest.mark.parametrize("name", MODELS)
def test_training_step(report, note, name: str, peer: str) -> None:
    ways = ("ours", peer, "frozen") if peer == "full" else ("ours", peer)
    trainings = {way: Training(name, way) for way in ways}
    comparison = Comparison(trainings, rounds=ROUNDS)
    refreshing = trainings["ours"].refresh() / INTERVAL
    comparison.median["ours"] += refreshing
    ratio = comparison.median["ours"] / comparison.median[peer]
    note(
        f"{name}: a step takes {ratio:.3f} of {peer}'s (bar {BARS[peer]}), which trains "
        f"{trainings[peer].trained:,d} parameters and ours {trainings['ours'].trained:,d}"
    )
    if "frozen" in trainings:
        least = comparison.median["frozen"] / comparison.median[peer]
        note(f"  forward and the inputs' gradients alone take {least:.3f} of {peer}'s")
    for way, training in trainings.items():
        parts = ", ".join(f"{part} {training.median(part):.0f} ms" for part in PARTS)
        extra = f", refresh {refreshing:.1f} ms a step" if way == "ours" else ""
        note(f"  {way}: {parts}{extra}")
    report(comparison, {peer: SHARE_OF_BAR / BARS[peer]}, rounds=1)


def mixture_step(way: str) -> Callable[[], None]:
    """A step of a mixture of experts whose linear layers and experts train: all of them, or 5 %."""
    model = make_mixture()
    tokens = torch.randint(0, model.config.vocab_size, (4, 256))
    if way == "ours":
        attach(model, SparseConfig(density=DENSITY))
    else:
        model.set_experts_implementation(way)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("_proj.weight") or ".experts." in name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_mixture_of_experts(report, note) -> None:
    """No bar but to be no slower than full fine-tuning, by whichever of transformers' products."""
    ways = ("ours", "eager", "grouped_mm")
    comparison = Comparison({way: mixture_step(way) for way in ways}, rounds=ROUNDS)
    for peer in ways[1:]:
        share = comparison.median["ours"] / comparison.median[peer]
        note(f"mixture of experts: a step takes {share:.3f} of full fine-tuning's with {peer}")
    report(comparison, dict.fromkeys(ways[1:], 1.0), rounds=1)


# ---- memory ----


def resident(field: str) -> int:
    """Bytes of this process in memory (VmRSS), or the most there have been (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


def load(name: str) -> None:
    """Libraries, and stacks of threads, by a step of a tiny model of the same kind."""
    MODELS["tiny"] = ({**MODELS[name][0], "num_hidden_layers": 1, "vocab_size": 64}, (1, 8))
    for way in ("ours", "lora"):
        Training("tiny", way)()
    gc.collect()


def resident_peak(name: str, way: str) -> int:
    """Peak of three steps above the model's own memory, as the system counts it."""
    load(name)
    training = Training(name, way)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for _ in range(3):
        training()
    return resident("VmHWM") - training.own_memory


def allocated_peak(name: str, way: str) -> int:
    """The same of two steps, in bytes of tensors that are alive at once."""
    load(name)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training = Training(name, way)
        with record_function("steps"):
            training()
            training()
    events = profiler.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == "steps")
    changes = [event for event in events if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        if event.start_ns() >= start:
            peak = max(peak, alive)
    return peak - training.own_bytes


@pytest.mark.parametrize("measure", [resident_peak, allocated_peak])
@pytest.mark.parametrize("name", MODELS)
def test_peak_memory(note, name: str, measure: Callable[[str, str], int]) -> None:
    """Each in a process of its own."""
    peaks = {}
    for way in ("ours", "lora"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[way] = pool.apply(measure, (name, way)) / 2**20
    note(
        f"{name}: {measure.__name__} above the model's own {peaks['ours']:.0f} MiB, "
        f"LoRA's {peaks['lora']:.0f} MiB"
    )
    assert peaks["ours"] <= peaks["lora"]


def test_every_layer_is_sparse(note) -> None:
    """Ours, LoRA and SHiRA are in the same layers, and the head is in none."""
    model = attach(make("llama_47m"), SparseConfig(density=DENSITY))
    assert sum(isinstance(module, SparseLayer) for module in model.modules()) == 7 * 12
    lora = peft.get_peft_model(make("llama_47m"), lora_config())
    adapted = [m for m in lora.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(adapted) == 7 * 12
