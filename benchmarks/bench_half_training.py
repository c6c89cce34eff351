"""A training step of HFT beside full fine-tuning with torch's fused AdamW, and where the saving is.

Weights are random: times don't depend on them.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import Comparison
from partune import _native
from partune.optim import HalfAdamW
from partune.selection import Half

SHARE_OF_BAR = {"avx512": 1.0, "avx2": 0.5}.get(_native.require().cpu_isa()[:6], 0.0)
WIDE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
# By model: its config, tokens of a step, and the bar on its time.
MODELS = {
    "llama_47m": ({**WIDE, "num_hidden_layers": 12, "vocab_size": 8192}, (4, 256), 0.87),
    "smollm2_135m": ({**WIDE, "num_hidden_layers": 30, "vocab_size": 49152}, (4, 128), 0.93),
}
PARTS = ("forward", "backward", "optimizer")
ROUNDS = 7


class Training:
    """A model and its optimizer; a call is one step and its parts are timed."""

    def __init__(self, name: str, half: bool) -> None:
        sizes, self.shape, _ = MODELS[name]
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**sizes))
        if half:
            self.optimizer = HalfAdamW(self.model, lr=1e-5, plan=Half(seed=0))
        else:
            parameters = self.model.parameters()
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        self.tokens = torch.randint(0, sizes["vocab_size"], self.shape)
        self.times: dict[str, list[float]] = {part: [] for part in PARTS}
        self.bytes_held = 0

    def __call__(self) -> None:
        start = time.perf_counter()
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        self._lap("forward", start)
        start = time.perf_counter()
        loss.backward()
        self._lap("backward", start)
        start = time.perf_counter()
        self.optimizer.step()
        self._lap("optimizer", start)
        self.bytes_held = self._bytes()
        self.optimizer.zero_grad()

    def _lap(self, part: str, start: float) -> None:
        self.times[part].append(1e3 * (time.perf_counter() - start))

    def _bytes(self) -> int:
        """Of gradients and of the optimizer's state."""
        held = [p.grad for p in self.model.parameters() if p.grad is not None]
        held += [v for state in self.optimizer.state.values() for v in state.values()
                 if isinstance(v, torch.Tensor)]  # fmt: skip
        return sum(tensor.nbytes for tensor in held)

    def median(self, part: str) -> float:
        return statistics.median(self.times[part][1:])

    def matmul_work(self) -> float:
        """Multiplications for a token, in matrix entries: forward, dX, and dW of what learns."""
        work = 0
        for parameter in self.model.parameters():
            if parameter.dim() == 2:  # the tied embedding is the head's matrix
                work += parameter.numel() * (2 + parameter.requires_grad)
        return work


@pytest.mark.parametrize("name", MODELS)
def test_training_step(report, note, name: str) -> None:
    half, full = Training(name, True), Training(name, False)
    comparison = Comparison({"ours": half, "full": full}, rounds=ROUNDS)
    bound = half.matmul_work() / full.matmul_work()
    held = half.bytes_held / full.bytes_held
    whole = sum(full.median(part) for part in PARTS)
    ratio = comparison.median["ours"] / comparison.median["full"]
    note(
        f"{name}: {half.optimizer.plan.share:.1%} learns; a step takes {ratio:.3f} of full "
        f"fine-tuning's (bar {MODELS[name][2]}; matrix products alone allow {bound:.3f}), "
        f"gradients and state {held:.3f} of its memory"
    )
    for part in PARTS:
        mine, theirs = half.median(part), full.median(part)
        saved = (theirs - mine) / whole
        note(f"  {part}: {mine:.0f} of {theirs:.0f} ms, saves {saved:.1%} of a full step")
    if name == "smollm2_135m":
        assert held <= 0.62
    report(comparison, {"full": SHARE_OF_BAR / MODELS[name][2]}, rounds=1)
