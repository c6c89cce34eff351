"""Transformers of every family of names, small and with random weights, for the tests of HFT."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

logging.set_verbosity_error()

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 50,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
LEVELS = ("category", "layer", "model", "rows", "columns", "elements")
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


def named_toy(dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Module:
    """Attention with a fused matrix, an MLP, norms, a head, by names that are known."""

    def block() -> nn.Module:
        return nn.ModuleDict({
            "self_attn": nn.ModuleDict(
                {"qkv_proj": nn.Linear(24, 72), "o_proj": nn.Linear(24, 24)}
            ),
            "mlp": nn.ModuleDict({"fc1": nn.Linear(24, 40), "fc2": nn.Linear(40, 24)}),
            "ln_1": nn.LayerNorm(24), "ln_2": nn.LayerNorm(24),
        })  # fmt: skip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ModuleDict({
            "layers": nn.ModuleList([block() for _ in range(layers)]), "head": nn.Linear(24, 5),
        })  # fmt: skip
    return model.to(dtype)


def put_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        grad = torch.randn(parameter.shape, generator=generator) * scale
        if parameter.requires_grad:
            parameter.grad = grad.to(parameter.dtype)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
