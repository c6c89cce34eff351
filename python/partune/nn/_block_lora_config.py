"""BlockLoRAConfig: what `attach` takes for Block-LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from partune.nn._block_lora_layers import dtype_beside, layer_for
from partune.nn._block_lora_parts import Parts, rows_of_parts
from partune.nn._layers import TrainedCopy
from partune.nn._registry import AdapterConfig, Placement
from partune.nn._targets import (
    PROJECTIONS_OUT,
    Rules,
    check_names,
    ends_in,
    head_names,
    target_names,
    trained_layers,
)
from partune.nn.block_lora import (
    BLOCKS,
    RANK,
    BlockLoRA,
    BlockLoRAParts,
    LowRank,
    check_blocks,
    check_options,
)

_T = TypeVar("_T")
_RULES = Rules(
    "Block-LoRA",
    "a linear layer",
    lambda module: layer_for(module) is not None,
    re.compile(rf"(.*\.)?({PROJECTIONS_OUT})"),
)


@dataclass(frozen=True)
class BlockLoRAConfig(AdapterConfig):
    """Block-LoRA for a whole model: low-rank factors beside its frozen linear layers.

    Takes `nn.Linear` and its subclasses, transformers' Conv1D, and layers of bitsandbytes, torchao
    and others with `in_features` and `out_features`, whose own forward then computes the frozen
    product. `blocks=1` is plain LoRA.

    Args:
        rank: of the update of each layer.
        blocks: into how many parts the shared down-projection is cut; a divisor of the layer's
            input features (share="input") or of the rank (share="rank").
        share: "input" or "rank", as `BlockLoRA` explains. With "rank" all arms stay equal from the
            usual start, so the update is that of rank/blocks.
        alpha: numerator of the scale; None: the layer's rank.
        dropout: probability of each input feature to be left out in training.
        target_modules: names of modules, each matched as a suffix ("attn.q_proj"), or one regular
            expression that has to match a whole name. None: all linear layers but the head,
            projections out of the model and poolers.
        scaling: "standard": alpha/rank; "rslora": alpha/√rank.
        rank_pattern, alpha_pattern: by suffix, another rank or alpha for some of the layers; the
            longest suffix that matches counts.
        parts: by suffix, which parts of a fused layer get factors, each its own: {"c_attn": ("q",
            "v")}. Parts are "q", "k", "v", "gate" and "up" where the layer's name tells how it is
            laid out, else ranges of its outputs: {"Wqkv": {"q": (0, 768)}}.
        modules_to_save: suffixes of the modules that are trained whole, () for none. None: the head
            by its usual names (classifier, head, fc, score), where there is one. Each adapter
            trains a copy of its own.

    Raises:
        TypeError: a string where names are wanted.
        ValueError: a number out of range, another `share` or `scaling`. `attach` raises it too, for
            blocks that don't divide what they cut of a layer, and patterns that match none.

    Reference: arXiv 2501.16720, as `BlockLoRA` reads it.

    Example:
        >>> from partune.nn import attach, trainable_parameters
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> trainable_parameters(attach(model, BlockLoRAConfig(rank=4, target_modules=["0"])))
        (256, 2600)
    """

    method: ClassVar[str] = "block_lora"

    rank: int = RANK
    blocks: int = BLOCKS
    share: str = "input"
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    scaling: str = "standard"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, Parts] = field(default_factory=dict)
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_names("modules_to_save", self.modules_to_save)
        for key, parts in self.parts.items():
            check_names(f"parts[{key!r}]", parts)
            if not parts:
                raise ValueError(f"parts[{key!r}]: got none, want some; leave {key!r} out for all")
        for rank in (self.rank, *self.rank_pattern.values()):
            for alpha in (self.alpha, *self.alpha_pattern.values()):
                check_options(rank, self.blocks, self.share, alpha, self.dropout, self.scaling)

    def plan(self, model: nn.Module) -> Mapping[str, Placement]:
        """Say what becomes of which module; the model stays as it is."""
        heads = head_names(model, self.modules_to_save)
        names = target_names(model, self.target_modules, heads, _RULES)
        ranks = _matched("rank_pattern", self.rank_pattern, names)
        alphas = _matched("alpha_pattern", self.alpha_pattern, names)
        rows = rows_of_parts(model, _matched("parts", self.parts, names))
        plan: dict[str, Placement] = {}
        for name in names:
            layer = layer_for(model.get_submodule(name))
            assert layer is not None
            rank, alpha = ranks.get(name, self.rank), alphas.get(name, self.alpha)
            plan[name] = Placement(layer, self._factors(model, name, rank, alpha, rows.get(name)))
        for name in dict.fromkeys(trained_layers(model, heads)):
            plan[name] = Placement(TrainedCopy, TrainedCopy.of(model.get_submodule(name)))
        return plan

    def _factors(
        self,
        model: nn.Module,
        name: str,
        rank: int,
        alpha: float | None,
        rows: Mapping[str, Tensor] | None,
    ) -> LowRank:
        module = model.get_submodule(name)
        layer = layer_for(module)
        assert layer is not None
        inputs, outputs = layer.features(module)
        check_blocks(self.blocks, self.share, rank, inputs, name)
        # a quantised layer may hold its weight as a buffer
        weight = next(chain(module.parameters(), module.buffers(), model.parameters()), None)
        device = None if weight is None else weight.device

        def factors(out: int) -> BlockLoRA:
            return BlockLoRA(
                inputs, out, rank=rank, blocks=self.blocks, share=self.share, alpha=alpha,
                dropout=self.dropout, scaling=self.scaling, device=device,
                dtype=dtype_beside(weight),
            )  # fmt: skip

        if rows is None:
            return factors(outputs)
        parts = {part: factors(len(own)) for part, own in rows.items()}
        return BlockLoRAParts(parts, {p: own.to(device) for p, own in rows.items()}, outputs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> BlockLoRAConfig:
        return cls(**options)


def _matched(argument: str, pattern: Mapping[str, _T], names: Iterable[str]) -> dict[str, _T]:
    """What a pattern says of which layer, the longest suffix first."""
    found, unused = {}, set(pattern)
    for name in names:
        hits = [suffix for suffix in pattern if ends_in(name, suffix)]
        unused -= set(hits)
        if hits:
            found[name] = pattern[max(hits, key=len)]
    if unused:
        raise ValueError(
            f"{argument}: {sorted(unused)} matched none of the layers that get factors, such as "
            f"{', '.join(list(names)[:4])}"
        )
    return found
