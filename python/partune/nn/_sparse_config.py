"""SparseConfig: what `attach` takes to train selected entries of a model's linear layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from partune import selection as selections
from partune.nn._layers import TrainedCopy, base_modules
from partune.nn._registry import AdapterConfig, Placement
from partune.nn._sparse_entries import SparseEntries
from partune.nn._sparse_experts import SparseExperts, is_experts
from partune.nn._sparse_layers import (
    SparseConv1D,
    SparseLinear,
    check_selection,
    check_weight,
    entries_of,
    settled,
)
from partune.nn._sparse_writing import Parts, WrittenLayer
from partune.nn._targets import (
    PROJECTIONS_OUT,
    Rules,
    check_names,
    head_names,
    is_conv1d,
    target_names,
    trained_layers,
)
from partune.selection import PrincipalWeights, Proposal, Selection
from partune.selection.budget import DEFAULT_DENSITY, Block
from partune.selection.protocol import State, describe

_RULES = Rules(
    "sparse training",
    "an nn.Linear, GPT-2's Conv1D or stacked experts as transformers' experts interface has them "
    "(partune.optim.SparseAdamW takes others)",
    lambda module: layer_for(module) is not None,
    re.compile(rf"(.*\.)?({PROJECTIONS_OUT})"),
)
_COMPACT_LIMIT = 2 / 3  # 24 bytes per selected entry against full fine-tuning's 16 per entry


@dataclass(frozen=True)
class SparseConfig(AdapterConfig):
    """Selected entries of a model's linear layers train, and the rest of it is frozen.

    The layer route: the gradient of the selected entries is formed alone, the dense one never, so
    that a step costs little more than forward and the inputs' gradients. Any optimizer takes the
    parameters, one vector `values` per weight; `refresh` selects anew. Takes `nn.Linear`,
    transformers' Conv1D, and the stacked experts of its mixtures of experts (Mixtral, Qwen-MoE,
    DeepSeek, gpt-oss and others), of which each is a matrix of its own. Weights that several layers
    share have one selection.

    Args:
        selection: which entries of each matrix, see `partune.selection`; by the weights alone.
        density: the share of each matrix, k = floor(density·out·in).
        budget_rank: instead, as many entries as a LoRA of this rank has parameters.
        block: rows and columns of what is selected as one, see `partune.selection.topk_csr`; k is
            that of whole blocks, which have to divide every matrix. Of rows and columns divisible
            by 4 the gradient takes less time.
        target_modules: names of modules, each matched as a suffix ("attn.q_proj"), or one regular
            expression that has to match a whole name. None: all linear layers and experts but the
            head, projections out of the model and poolers.
        modules_to_save: suffixes of the modules that are trained whole, () for none. None: the head
            by its usual names (classifier, head, fc, score), where there is one. Each adapter
            trains a copy of its own.

    Raises:
        TypeError: no selection, or a string where names are wanted. `attach` raises it too, for
            quantised and sharded weights.
        ValueError: a selection by gradients, a budget out of range, density and budget_rank both.
            `attach` raises it too, for a weight that a module of another kind shares.

    Reference: LIFT (arXiv 2506.00772), section 3.

    Example:
        >>> from partune.nn import attach, trainable_parameters
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> trainable_parameters(attach(model, SparseConfig(density=0.25)))
        (576, 2920)
    """

    method: ClassVar[str] = "sparse"

    selection: Selection = field(default_factory=PrincipalWeights)
    density: float | None = DEFAULT_DENSITY
    budget_rank: int | None = None
    block: Block = (1, 1)
    target_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_selection(self.selection)
        settled(self.density, self.budget_rank, self.block)
        check_names("modules_to_save", self.modules_to_save)

    def plan(self, model: nn.Module) -> Mapping[str, Placement]:
        """Say what becomes of which module, and select; the model stays as it is."""
        plan = self.plan_to_fill(model)
        selected: set[SparseEntries] = set()
        for name, placement in plan.items():
            for entries, weight in _parts(model, name, placement).values():
                if entries not in selected:
                    selected.add(entries)
                    with _named(name):
                        entries.select_(weight)
        return plan

    def plan_to_fill(self, model: nn.Module) -> Mapping[str, Placement]:
        heads = head_names(model, self.modules_to_save)
        names = target_names(model, self.target_modules, heads, _RULES)
        for name in names:
            for weight in _weights(model, name).values():
                check_weight(name, weight)
        _refuse_shared(model, names)
        budget = settled(self.density, self.budget_rank, self.block)
        of_weight: dict[Tensor, SparseEntries] = {}
        matrices = 0
        plan: dict[str, Placement] = {}
        for name in names:
            weights = _weights(model, name)
            for weight in weights.values():
                if weight not in of_weight:
                    with _named(name):
                        of_weight[weight] = entries_of(weight, self.selection, budget, matrices)
                    matrices += of_weight[weight].slices
            layer = _layer_for(model, name)
            entries = {prefix: of_weight[weight] for prefix, weight in weights.items()}
            plan[name] = Placement(layer, layer.adapter_of(entries))
        _warn({name: _share(_parts(model, name, placement)) for name, placement in plan.items()})
        for name in dict.fromkeys(trained_layers(model, heads)):
            plan[name] = Placement(TrainedCopy, TrainedCopy.of(model.get_submodule(name)))
        return plan

    def to_dict(self) -> dict[str, Any]:
        return {
            "selection": describe(self.selection),
            "density": self.density,
            "budget_rank": self.budget_rank,
            "block": self.block,
            "target_modules": self.target_modules,
            "modules_to_save": self.modules_to_save,
        }

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SparseConfig:
        selection = _from_description(options["selection"])
        block = tuple(options.get("block", (1, 1)))  # older files have none
        return cls(**{**options, "selection": selection, "block": block})


@dataclass(frozen=True)
class _Unknown(Selection):
    """The selection that a file names by a class which isn't partune's."""

    type: str

    def propose(self, weight: Tensor, grad: Tensor | None, state: State) -> Proposal:
        raise ValueError(
            f"selection: the adapter came from a file and was selected by {self.type}, which "
            "partune can't make; give it, refresh(model, optimizer, selection=...)"
        )


def _from_description(description: Mapping[str, Any]) -> Selection:
    options = {key: value for key, value in description.items() if key != "type"}
    known = getattr(selections, description["type"], None)
    if known in (selections.PrincipalWeights, selections.Magnitude, selections.Random):
        made: Selection = known(**options)
        return made
    return _Unknown(description["type"])


def layer_for(module: nn.Module) -> type[WrittenLayer] | None:
    """What a module becomes; None where it computes neither x Wᵀ + b itself nor stacked experts."""
    if is_conv1d(module):
        return SparseConv1D
    if is_experts(module):
        return SparseExperts
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return SparseLinear if plain else None


def _layer_for(model: nn.Module, name: str) -> type[WrittenLayer]:
    layer = layer_for(model.get_submodule(name))
    assert layer is not None
    return layer


def _weights(model: nn.Module, name: str) -> dict[str, Tensor]:
    return _layer_for(model, name).weights_of(model.get_submodule(name))


def _parts(model: nn.Module, name: str, placement: Placement) -> Parts:
    """The entries of a placement and their weights; none of the head's."""
    if not issubclass(placement.layer, WrittenLayer) or placement.adapter is None:
        return {}
    return placement.layer.parts_of(model.get_submodule(name), placement.adapter)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say in an error which module it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _refuse_shared(model: nn.Module, names: Sequence[str]) -> None:
    """Weights that a module of another kind reads, whose part of the gradient would be missed."""
    weights = {w: name for name in names for w in _weights(model, name).values()}
    targets = set(names)
    for name, module in base_modules(model):
        for parameter in module.parameters(recurse=False):
            if parameter in weights and name not in targets:
                raise ValueError(
                    f"target_modules: the weight of {weights[parameter]} is {name}'s too, a "
                    f"{type(module).__name__} outside of target_modules, whose gradient would be "
                    "missed; leave it out, or use partune.optim.SparseAdamW"
                )


def _share(parts: Parts) -> float:
    """Of a layer's weights, that is selected; the same of each but for rounding."""
    return min(entries.share for entries, _ in parts.values())


def _warn(shares: Mapping[str, float]) -> None:
    """Warn of selections that hold nothing, or take more memory than full fine-tuning."""
    for names, consequence in (
        ([n for n, share in shares.items() if share == 0],
         "no entries are selected, so they do not train; raise density or budget_rank"),
        ([n for n, share in shares.items() if share > _COMPACT_LIMIT],
         "a vector of so many entries takes more memory than full fine-tuning; lower density or "
         "budget_rank"),
    ):  # fmt: skip
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            warnings.warn(f"{names[0]}{more}: {consequence}", stacklevel=6)
