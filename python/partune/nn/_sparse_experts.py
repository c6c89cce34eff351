"""Stacked experts of a mixture of experts, of which selected entries train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from partune.nn._sparse_entries import SparseEntries
from partune.nn._sparse_writing import Parts, WrittenLayer
from partune.ops.sparse_linear import sparse_grouped_linear

_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "is_concatenated")


def is_experts(module: nn.Module) -> bool:
    """Whether it computes stacked experts as transformers' experts interface says.

    Such a module tells by flags how its weights lie, and any implementation may compute it.
    """
    return all(hasattr(module, flag) for flag in _FLAGS) and all(
        isinstance(getattr(module, name, None), Tensor) and getattr(module, name).dim() == 3
        for name in _weight_names(module)
    )


def _weight_names(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


class SparseExperts(WrittenLayer):
    """Stacked experts whose frozen weights hold entries that train, as many in each expert.

    Tokens are sorted by their experts, whose products then take whole rows. How many an expert has
    is read back from the device.
    """

    adapter: nn.ModuleDict

    @classmethod
    def weights_of(cls, module: nn.Module) -> dict[str, Tensor]:
        return {f"{name}.": getattr(module, name) for name in _weight_names(module)}

    @classmethod
    def adapter_of(cls, entries: Mapping[str, SparseEntries]) -> nn.Module:
        return nn.ModuleDict({prefix.removesuffix("."): own for prefix, own in entries.items()})

    @classmethod
    def parts_of(cls, module: nn.Module, adapter: nn.Module) -> Parts:
        return {
            prefix: (getattr(adapter, prefix.removesuffix(".")), weight)
            for prefix, weight in cls.weights_of(module).items()
        }

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, features], the experts of each token and what they count, [tokens, k]."""
        experts: Any = self
        if getattr(self, "_is_expert_parallel", False):
            raise RuntimeError(
                "experts: got some that are spread over devices (expert parallelism), whose "
                "weights can't be written; train them unsharded"
            )
        chosen = top_k_index.shape[1]
        sorted_index, order = torch.sort(top_k_index.reshape(-1), stable=True)
        weight_names = _weight_names(self)
        sizes = torch.bincount(sorted_index, minlength=len(getattr(self, weight_names[1]))).tolist()
        inner = self._product(
            weight_names[0], hidden_states.index_select(0, order // chosen), sizes
        )
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        output = self._product(weight_names[1], inner, sizes)
        if experts.has_post_expert_norm:
            output = experts.post_expert_norm(output)
        output = output * top_k_weights.reshape(-1, 1).index_select(0, order)
        output = output.index_select(0, order.argsort())
        output = output.view(*top_k_index.shape, output.shape[1])
        return output.sum(1).to(hidden_states.dtype)

    def _product(self, name: str, rows: Tensor, sizes: list[int]) -> Tensor:
        entries: SparseEntries = getattr(self.adapter, name)
        weight, values = getattr(self, name), entries.values
        self.refuse_stale(entries, values, weight)
        return sparse_grouped_linear(
            rows, weight, getattr(self, f"{name}_bias", None), values, *entries.csr, sizes,
            blocks=entries.in_blocks, transposed=bool(self.is_transposed),
        )  # fmt: skip
