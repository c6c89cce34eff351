"""What the demo measures of a training run, and how it shows it."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, ProgressCallback, Trainer

from arithmetic import Scores
from partune.optim import SparseAdamW


class StepTimer(ProgressCallback):
    """The Trainer's progress bar, with the loss on the bar instead of in log lines, and a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer_began = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer_seconds.append(time.perf_counter() - self.optimizer_began)

    def on_step_end(self, args, state, control, **kwargs):
        self.step_seconds.append(time.perf_counter() - self.step_began)
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


@dataclass(frozen=True)
class Run:
    """The loss of every step, and what the steps and the optimizer's state cost."""

    losses: list[float]
    state_mb: float
    first_optimizer_seconds: float
    optimizer_seconds: float  # the median from the second step on, as is the next one
    step_seconds: float

    @classmethod
    def of(cls, trainer: Trainer, timer: StepTimer, optimizer: torch.optim.Optimizer) -> "Run":
        return cls(
            losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            state_mb=state_bytes(optimizer) / 1e6,
            first_optimizer_seconds=timer.optimizer_seconds[0],
            optimizer_seconds=median(timer.optimizer_seconds[1:]),
            step_seconds=median(timer.step_seconds[1:]),
        )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


def kept_bytes(model: PreTrainedModel, inputs: dict[str, Any]) -> int:
    """Storages that a training forward keeps for its backward, each once, weights not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(**inputs)
    del output
    return sum(kept.values())


@torch.no_grad()
def count_changed(
    model: PreTrainedModel, base: PreTrainedModel, optimizer: SparseAdamW
) -> tuple[int, int]:
    """Count the weights that differ from the base model's: all, and those not selected."""
    changed = unselected = 0
    for weight, old in zip(model.parameters(), base.parameters(), strict=True):
        differs = weight != old
        changed += int(differs.sum())
        if weight.requires_grad:
            differs &= ~optimizer.selected(weight)
        unselected += int(differs.sum())
    return changed, unselected


def print_table(columns: dict[str, tuple[Scores | None, Run | None]]) -> None:
    def cell(source: Scores | Run | None, field: str, digits: int) -> str:
        value = getattr(source, field, None)
        return f"{'-' if value is None else f'{value:.{digits}f}':>20}"

    print(f"\n{'':<36}" + "".join(f"{name:>20}" for name in columns))
    for label, field, digits in (
        ("accuracy, exact", "exact", 3),
        ("accuracy, format-tolerant", "tolerant", 3),
        ("perplexity on general text", "perplexity", 2),
    ):
        print(f"{label:<36}" + "".join(cell(s, field, digits) for s, _ in columns.values()))
    for label, field, digits in (
        ("optimizer state, MB", "state_mb", 1),
        ("seconds per step, median", "step_seconds", 2),
        ("  of which in the optimizer", "optimizer_seconds", 3),
        ("optimizer's first step, seconds", "first_optimizer_seconds", 2),
    ):
        print(f"{label:<36}" + "".join(cell(run, field, digits) for _, run in columns.values()))


def plot_losses(path: Path, runs: dict[str, Run]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, run in runs.items():
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=label)
    axes.set(xlabel="step", ylabel="loss on the answers", ylim=(0, None))
    axes.set_title("Learning to add two-digit numbers")
    axes.legend()
    figure.savefig(path, dpi=120)
