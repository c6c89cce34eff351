"""Block-LoRA: low-rank factors whose blocks share one down-projection (arXiv 2501.16720)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partune.ops import block_lora
from partune.ops.block_lora import block_lora_linear_of_layers

RANK = 8
BLOCKS = 2
SHARES = ("input", "rank")
SCALINGS = ("standard", "rslora")


class LowRank(nn.Module):
    """Low-rank factors beside a frozen linear layer, which are never multiplied out.

    A subclass keeps the parameters and says by `factors` what the ops take. In training each call
    draws a dropout mask by torch's own generator, which gradient checkpointing restores: a
    recomputed forward has the mask of the first.
    """

    in_features: int
    share: str
    scale: float
    dropout: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """The down- and the up-projection."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """What is added to the layer's weight, [out, in], in float32 or float64."""
        raise NotImplementedError

    def forward(self, input: Tensor, base: Tensor, *, reuse: bool = False) -> Tensor:
        """Add the low-rank product to `base`, the frozen layer's output; `reuse` overwrites that.

        Shape:
            input [..., in]; base and output [..., out].
        """
        down, up = self._factors_for(input)
        outputs = block_lora(
            input, [base], [down], [up], scales=[self.scale], share=self.share,
            dropout=self._dropout(), inplace=reuse and base.is_contiguous(),
        )  # fmt: skip
        return outputs[0]

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the frozen layer with the low-rank product added on the way.

        A weight that trains, or whose values only its own class can read (torchao's quantised
        ones), is left to `nn.functional.linear`.
        """
        if weight.requires_grad or is_wrapped(weight):
            output: Tensor = self(input, F.linear(input, weight, bias), reuse=True)
            return output
        down, up = self._factors_for(input)
        (output,) = block_lora_linear_of_layers(
            input, [weight], [bias], [down], [up], scales=[self.scale], share=self.share,
            dropout=self._dropout(),
        )  # fmt: skip
        return output

    def _factors_for(self, input: Tensor) -> tuple[Tensor, Tensor]:
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"input: got shape {tuple(input.shape)}, want (..., {self.in_features})"
            )
        return self.factors()

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0


def is_wrapped(weight: Tensor) -> bool:
    """Whether only the weight's own class can read its values; also while a compiler traces."""
    return hasattr(type(weight), "__tensor_flatten__")


class BlockLoRA(LowRank):
    """The factors beside one linear layer: y = W x + b + scale · up · down · x, in blocks.

    `attach` and `BlockLoRALinear` place these by themselves. The update of W has in·rank/blocks +
    rank·out parameters. What of it is cut into blocks, `share` says; the paper's text leaves both
    readings open:

    - `"input"`: x is cut into `blocks` chunks along its features, and one down-projection serves
      them all, so it takes their sum. The update keeps its full rank.
    - `"rank"`: the down-projection has rank/blocks rows, and `blocks` up-projections ("arms") share
      it. All arms get the same gradient and start at zero, so they stay equal for ever: this is
      LoRA of rank/blocks, scaled by `blocks`. Kept because it may be what was published.

    `blocks=1` is plain LoRA. The start is the identity: down is kaiming-uniform (a = √5), up zero.

    Args:
        in_features, out_features: of the layer.
        rank: of the update, with share="input".
        blocks: how many; a divisor of in_features (share="input") or of rank (share="rank").
        share: "input" or "rank".
        alpha: the numerator of `scale`; None: rank.
        dropout: probability of each feature of x to be left out in training, before the chunks are
            summed.
        scaling: "standard": scale = alpha/rank; "rslora": alpha/√rank.
        device, dtype: of the parameters; float32 also where a model computes in bfloat16.

    Shape:
        down [rank, in_features/blocks], up [out_features, rank] with share="input"; down
        [rank/blocks, in_features], up [blocks, out_features, rank/blocks] with share="rank".

    Raises:
        ValueError: a number that is out of range, another `share` or `scaling`, blocks that don't
            divide what they cut.

    Reference: One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot
    Learning (arXiv 2501.16720); RsLoRA (arXiv 2312.03732) for `scaling`.

    Example:
        >>> factors = BlockLoRA(64, 32, rank=8, blocks=4)
        >>> sum(p.numel() for p in factors.parameters()) == 64 * 8 // 4 + 8 * 32
        True
    """

    down: nn.Parameter
    up: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = RANK,
        blocks: int = BLOCKS,
        share: str = "input",
        alpha: float | None = None,
        dropout: float = 0.0,
        scaling: str = "standard",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(rank, blocks, share, alpha, dropout, scaling)
        check_blocks(blocks, share, rank, in_features)
        self.in_features, self.rank, self.blocks, self.share = in_features, rank, blocks, share
        self.alpha = float(rank if alpha is None else alpha)
        self.scale = self.alpha / (rank if scaling == "standard" else math.sqrt(rank))
        self.dropout = float(dropout)
        like = torch.empty(0, device=device, dtype=dtype)
        if share == "input":
            down, up = (
                like.new_empty(rank, in_features // blocks),
                like.new_empty(out_features, rank),
            )
        else:
            thin = rank // blocks
            down, up = like.new_empty(thin, in_features), like.new_empty(blocks, out_features, thin)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start, at which nothing is added to the layer."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up

    @torch.no_grad()
    def delta(self) -> Tensor:
        wide = torch.float64 if self.down.dtype == torch.float64 else torch.float32
        down, up = self.down.to(wide), self.up.to(wide)
        if self.share == "rank":
            return self.scale * (up.sum(0) @ down)
        return self.scale * (up @ down).repeat(1, self.blocks)

    def extra_repr(self) -> str:
        parts = [f"rank={self.rank}", f"blocks={self.blocks}", f"share={self.share!r}"]
        parts += [f"scale={self.scale:g}"]
        parts += [f"dropout={self.dropout:g}"] if self.dropout else []
        return ", ".join(parts)


class BlockLoRAParts(LowRank):
    """The factors beside some parts of a fused layer, each with its own, such as q and v of a qkv.

    Where a part's outputs lie in the layer's, `rows` says. The parts are computed as one product of
    their ranks together, with zeros where a factor doesn't reach, so that the layer's output is
    written once.
    """

    def __init__(self, parts: Mapping[str, BlockLoRA], rows: Mapping[str, Tensor], out: int):
        super().__init__()
        first = next(iter(parts.values()))
        self.share, self.scale, self.dropout = first.share, first.scale, first.dropout
        self.blocks, self.out_features = first.blocks, out
        for name, part in parts.items():
            if not name.isidentifier() or hasattr(self, name):
                raise ValueError(
                    f"parts: got the name {name!r}, want an identifier that names nothing else of "
                    "a module, such as 'q'"
                )
            self.add_module(name, part)
            self.register_buffer(f"{name}_rows", rows[name], persistent=False)
        self.in_features = first.in_features

    def _parts(self) -> list[tuple[BlockLoRA, Tensor]]:
        return [(part, getattr(self, f"{name}_rows")) for name, part in self.named_children()]  # type: ignore[misc]

    def factors(self) -> tuple[Tensor, Tensor]:
        parts = self._parts()
        down = torch.cat([part.down for part, _ in parts])
        ups = []
        for part, rows in parts:
            zeros = part.up.new_zeros(*part.up.shape[:-2], self.out_features, part.up.shape[-1])
            ups.append(zeros.index_copy(-2, rows, part.up))
        return down, torch.cat(ups, dim=-1)

    @torch.no_grad()
    def delta(self) -> Tensor:
        parts = self._parts()
        deltas = [part.delta() for part, _ in parts]
        whole = deltas[0].new_zeros(self.out_features, deltas[0].shape[1])
        for delta, (_, rows) in zip(deltas, parts, strict=True):
            whole[rows] = delta
        return whole


def check_options(
    rank: int, blocks: int, share: str, alpha: float | None, dropout: float, scaling: str
) -> None:
    """Refuse what no layer takes."""
    for name, number in (("rank", rank), ("blocks", blocks)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: got {number!r}, want an int of at least 1")
    if share not in SHARES:
        raise ValueError(f"share: got {share!r}, want 'input' or 'rank'")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling: got {scaling!r}, want 'standard' or 'rslora'")
    if alpha is not None and not 0.0 < alpha < math.inf:
        raise ValueError(f"alpha: got {alpha!r}, want a number above 0, or None for that of rank")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: got {dropout!r}, want a probability below 1")


def check_blocks(blocks: int, share: str, rank: int, in_features: int, layer: str = "") -> None:
    """Refuse blocks that don't divide what they cut, of a layer by its name."""
    cut, size = ("input features", in_features) if share == "input" else ("rows of its rank", rank)
    if size % blocks:
        raise ValueError(
            f"blocks: {layer or 'the layer'} has {size} {cut}, which {blocks} blocks don't divide; "
            f"choose a divisor of {size}"
        )
