"""LIFT: fine-tune the principal weights of a language model (arXiv 2506.00772)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from partune.optim.sparse_adamw import SparseAdamW
from partune.selection import PrincipalWeights
from partune.selection.budget import DEFAULT_DENSITY

# Attention and MLP matrices by the names that models give them; matched as suffixes.
DEFAULT_TARGETS = (
    # Llama, Mistral, Qwen, Gemma, Phi, OPT, CLIP, Whisper; stacked experts of the same names
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "self_attn.out_proj", "attn.out_proj",
    "gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2",
    # Llama's own code and Mixtral's experts
    "wq", "wk", "wv", "wo", "w1", "w2", "w3",
    # GPT-2, GPT-J, GPT-NeoX, Falcon, BLOOM
    "c_attn", "c_proj", "c_fc", "fc_in", "fc_out", "query_key_value",
    "attention.dense", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h",
    # BERT, ViT, DINOv2
    "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
    # T5, DistilBERT
    "SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o",
    "EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v", "EncDecAttention.o",
    "wi", "wi_0", "wi_1", "q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2",
    # timm, nn.MultiheadAttention and nn.TransformerEncoderLayer
    "attn.qkv", "attn.proj", "in_proj_weight", "linear1", "linear2",
)  # fmt: skip


class LiftAdamW(SparseAdamW):
    """Fine-tune the principal weights of each matrix: `SparseAdamW` with LIFT's recipe.

    Selected are the entries where the matrix's approximation of rank `rank` is largest.

    Args:
        rank: of the approximation, from which the entries are read off; best about equal to
            `budget_rank`. A group may name its own.
        params, lr, betas, eps, weight_decay: as for `SparseAdamW`, and so every other keyword; the
            defaults are those of LIFT's released code. `lift_groups` makes the params.

    Raises:
        TypeError, ValueError: an option or a parameter that cannot be; the message says which.

    Example:
        >>> import torch
        >>> model = nn.ModuleDict({"up_proj": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)})
        >>> optimizer = LiftAdamW(lift_groups(model), lr=1e-4, rank=2, density=0.25)
        >>> model.up_proj(torch.ones(8)).sum().backward(); optimizer.step()
        >>> int(optimizer.selected(model.up_proj.weight).sum())
        16
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int = 128,
        density: float | None = DEFAULT_DENSITY,
        budget_rank: int | None = None,
        refresh_interval: int | None = 200,
        eps_mode: str = "uncorrected",
        **options: Any,
    ) -> None:
        if "selection" in options:
            raise TypeError("selection: LiftAdamW selects principal weights; use SparseAdamW")
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            selection=PrincipalWeights(rank),
            density=density,
            budget_rank=budget_rank,
            refresh_interval=refresh_interval,
            eps_mode=eps_mode,
            **options,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with a `rank` of its own or the optimizer's."""
        if isinstance(param_group, dict) and "rank" in param_group:
            group = {key: value for key, value in param_group.items() if key != "rank"}
            super().add_param_group({**group, "selection": PrincipalWeights(param_group["rank"])})
        else:
            super().add_param_group(param_group)


def lift_groups(
    model: nn.Module, targets: str | Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Choose what LIFT trains and freeze the rest of the model.

    Afterwards `requires_grad` is True for the matched matrices and False for every other parameter:
    embeddings, heads, norms and biases. Tied weights count once and match by any of their names.

    Args:
        targets: names of modules or parameters, each matched as a suffix ("q_proj",
            "mlp.down_proj"), or one regular expression that has to match a whole name. Default: the
            attention and MLP matrices of common architectures.

    Returns:
        One parameter group with names, for `LiftAdamW`.

    Raises:
        ValueError: nothing matches, or a target matches nothing.
        TypeError: a matched parameter is not floating point.

    Example:
        >>> model = nn.ModuleDict({"up_proj": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)})
        >>> [name for name, parameter in lift_groups(model)[0]["params"]]
        ['up_proj.weight']
    """
    matched: dict[Tensor, str] = {}
    used: set[str] = set()
    wanted = DEFAULT_TARGETS if targets is None else targets
    for name, parameter in model.named_parameters(remove_duplicate=False):
        hits = _hits(name, wanted) if parameter.dim() >= 2 else set()
        if hits:
            matched.setdefault(parameter, name)
            used |= hits
    unused = set() if targets is None or isinstance(targets, str) else set(targets) - used
    if not matched or unused:
        examples = [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]
        raise ValueError(
            f"targets: {sorted(unused) or wanted!r} matched no matrix of {type(model).__name__}, "
            f"which has {', '.join(examples[:8])}{', ...' if len(examples) > 8 else ''}"
        )
    for matrix, name in matched.items():
        if not matrix.is_floating_point():
            raise TypeError(f"{name}: got {matrix.dtype}, want floating-point weights")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in matched)
    return [{"params": [(name, matrix) for matrix, name in matched.items()]}]


def _hits(name: str, targets: str | Sequence[str]) -> set[str]:
    """The targets that match a parameter by its own name or its module's."""
    names = (name, name.rpartition(".")[0])
    if isinstance(targets, str):
        return {targets} if any(re.fullmatch(targets, n) for n in names) else set()
    return {t for t in targets if any(n == t or n.endswith("." + t) for n in names)}
