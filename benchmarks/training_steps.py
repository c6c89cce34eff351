"""What benchmarks of whole training steps share: the models, and a step whose parts are timed.

Weights are random: times don't depend on them.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

_WIDE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
# By model: its config, and the tokens of a step.
MODELS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "llama_47m": ({**_WIDE, "num_hidden_layers": 12, "vocab_size": 8192}, (4, 256)),
    "smollm2_135m": ({**_WIDE, "num_hidden_layers": 30, "vocab_size": 49152}, (4, 128)),
}
# As many tokens of a mixture of experts, most of whose 45 million weights are in its 32 experts.
MIXTURE = {
    "hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_hidden_layers": 4, "num_local_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 4096,
}  # fmt: skip
PARTS = ("forward", "backward", "optimizer")


def make(name: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**MODELS[name][0]))


def make_mixture() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**MIXTURE))


class TrainingStep:
    """A model and its optimizer; a call is one step, and its parts are timed."""

    def __init__(self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        sizes, shape = MODELS[name]
        self.model, self.optimizer = model, optimizer
        self.tokens = torch.randint(0, sizes["vocab_size"], shape)
        self.times: dict[str, list[float]] = {part: [] for part in PARTS}

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
        self.look()
        self.optimizer.zero_grad()

    def look(self) -> None:
        """Called while gradients and the optimizer's state are there."""

    def _lap(self, part: str, start: float) -> None:
        self.times[part].append(1e3 * (time.perf_counter() - start))

    def median(self, part: str) -> float:
        """Milliseconds, the first step left out."""
        return statistics.median(self.times[part][1:])
