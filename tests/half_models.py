"""Transformers of every family of names, small and with random weights, for the tests of HFT."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

logging.set_verbosity_error()

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 50,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
# By family: the model's class, and what its config gets.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "Mistral": ("MistralForCausalLM", GROUPED),
    "Gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 8}),
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50}),
    "GPTNeoX": ("GPTNeoXForCausalLM", SIZES),
    "Phi": ("PhiForCausalLM", SIZES),
    "Phi3": ("Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}),
    "Bert": ("BertForMaskedLM", SIZES),
    "ViT": ("ViTForImageClassification", {**SIZES, "image_size": 16, "patch_size": 8}),
    "Mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
}


def make(family: str, device: str = "cpu") -> nn.Module:
    """A model with the same weights each time."""
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(
        **{key: value for key, value in sizes.items() if family != "ViT" or key != "vocab_size"}
    )
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return getattr(transformers, name)(config).float()


def loss_of(model: nn.Module, family: str, seed: int) -> torch.Tensor:
    """The loss of a batch drawn by a seed."""
    generator = torch.Generator().manual_seed(seed)
    if family == "ViT":
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        return model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss
    tokens = torch.randint(0, 50, (2, 9), generator=generator)
    return model(input_ids=tokens, labels=tokens).loss
