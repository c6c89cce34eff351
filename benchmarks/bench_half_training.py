"""A training step of HFT beside full fine-tuning with torch's fused AdamW, and where it saves."""

from __future__ import annotations

import pytest
import torch
from training_steps import PARTS, TrainingStep, make

from conftest import SHARE_OF_BAR, Comparison
from partune.optim import HalfAdamW
from partune.selection import Half

# A step takes at most these shares of full fine-tuning's.
BARS = {"llama_47m": 0.87, "smollm2_135m": 0.93}
ROUNDS = 7


class Training(TrainingStep):
    """Full fine-tuning, or half of it."""

    def __init__(self, name: str, half: bool) -> None:
        model = make(name)
        optimizer = (
            HalfAdamW(model, lr=1e-5, plan=Half(seed=0))
            if half
            else torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        )
        super().__init__(name, model, optimizer)
        self.bytes_held = 0

    def look(self) -> None:
        self.bytes_held = self._bytes()

    def _bytes(self) -> int:
        """Of gradients and of the optimizer's state."""
        held = [p.grad for p in self.model.parameters() if p.grad is not None]
        held += [v for state in self.optimizer.state.values() for v in state.values()
                 if isinstance(v, torch.Tensor)]  # fmt: skip
        return sum(tensor.nbytes for tensor in held)

    def matmul_work(self) -> float:
        """Multiplications for a token, in matrix entries: forward, dX, and dW of what learns."""
        work = 0
        for parameter in self.model.parameters():
            if parameter.dim() == 2:  # the tied embedding is the head's matrix
                work += parameter.numel() * (2 + parameter.requires_grad)
        return work


@pytest.mark.parametrize("name", BARS)
def test_training_step(report, note, name: str) -> None:
    half, full = Training(name, True), Training(name, False)
    comparison = Comparison({"ours": half, "full": full}, rounds=ROUNDS)
    bound = half.matmul_work() / full.matmul_work()
    held = half.bytes_held / full.bytes_held
    whole = sum(full.median(part) for part in PARTS)
    ratio = comparison.median["ours"] / comparison.median["full"]
    note(
        f"{name}: {half.optimizer.plan.share:.1%} learns; a step takes {ratio:.3f} of full "
        f"fine-tuning's (bar {BARS[name]}; matrix products alone allow {bound:.3f}), "
        f"gradients and state {held:.3f} of its memory"
    )
    for part in PARTS:
        mine, theirs = half.median(part), full.median(part)
        saved = (theirs - mine) / whole
        note(f"  {part}: {mine:.0f} of {theirs:.0f} ms, saves {saved:.1%} of a full step")
    if name == "smollm2_135m":
        assert held <= 0.62
    report(comparison, {"full": SHARE_OF_BAR / BARS[name]}, rounds=1)
