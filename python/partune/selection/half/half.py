"""HFT's draw as options, and the plan that it gives for a model (arXiv 2404.18466)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from partune.ops._checks import one_of
from partune.selection.half.draw import draw_units
from partune.selection.half.naming import (
    Piece,
    Structure,
    Unit,
    matrix_of,
    module_of,
    read_structure,
)
from partune.selection.half.plan import HalfPlan, Live

WHOLE_LEVELS = ("category", "layer", "model")
FINER_LEVELS = ("rows", "columns", "elements")
BALANCES = ("matrices", "parameters")

Named = nn.Module | Mapping[str, Any] | Iterable[tuple[str, Any]]


@dataclass(frozen=True)
class Half:
    """Draw which half of a transformer learns in a round.

    Level "category", as published: in every block 2 of the attention matrices q, k, v, o; of the
    MLP matrices gate, up, down 2 in half of the blocks and 1 in the others; 1 of the 2 norms.
    Embeddings, heads and the final norm always learn, and so does whatever no name is known for. A
    bias goes with its matrix. Of n units that a category has otherwise, n/2 learn, rounded up in
    half of the blocks (with an odd number, in one block less) and down in the others; so 1 of an
    MLP's 2 matrices. A fused matrix counts as its parts; each expert is an MLP of its own.

    Levels "layer" and "model" draw half of the matrices, and half of the norms, of each block or of
    the model. "rows" and "columns" let half of the lines of each unit learn, "elements" each entry
    with probability 1/2.

    Args:
        seed: the plan's; the same on every machine.
        level: "category", "layer", "model", "rows", "columns" or "elements".
        ratio: the share that learns; with "elements" 0.5.
        balance: "matrices" counts matrices; "parameters" takes, of all sets of as many matrices,
            one that comes closest to the share of parameters, which differs where grouped-query
            attention makes k and v small.
        patterns: (regular expression, role) pairs for names that aren't known; see below.

    A pattern matches the whole path of a module inside its block. Roles are "attention." or "mlp."
    with one or more parts joined by "+" as they follow each other in the matrix's rows, or "norm":
    `patterns=((r"mixer\\.Wqkv", "attention.q+k+v"), (r"mixer\\.out", "attention.o"))`.

    Raises:
        TypeError, ValueError: an option that can't be; the message says which.

    Example:
        >>> block = nn.ModuleDict({name: nn.Linear(4, 4, bias=False)
        ...     for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([block])})
        >>> Half(seed=0).plan(model).share
        0.5
    """

    seed: int = 0
    level: str = "category"
    ratio: float = 0.5
    balance: str = "matrices"
    patterns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"seed: got {self.seed!r}, want an int")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}, want 64 bits")
        one_of("level", self.level, (*WHOLE_LEVELS, *FINER_LEVELS))
        one_of("balance", self.balance, BALANCES)
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio: got {self.ratio}, want 0 < ratio < 1")
        if self.level == "elements" and self.ratio != 0.5:
            raise ValueError(f"ratio: got {self.ratio}, want 0.5 at level 'elements', a bit each")
        for pattern in self.patterns:
            if len(pattern) != 2 or not all(isinstance(text, str) for text in pattern):
                raise TypeError(f"patterns: got {pattern!r}, want (regular expression, role)")
            _check_role(pattern[1])

    @property
    def whole(self) -> bool:
        """Whether matrices learn or freeze as wholes."""
        return self.level in WHOLE_LEVELS

    def plan(self, parameters: Named, *, heads: int | None = None) -> HalfPlan:
        """Draw a round.

        Args:
            parameters: a model, or its parameters or their shapes by name.
            heads: of attention, where q, k and v take turns in one matrix (GPT-NeoX); a model's
                config tells it.

        Raises:
            ValueError: no attention or MLP matrix is recognised, or a fused one can't be split.
        """
        if isinstance(parameters, nn.Module):
            config = getattr(parameters, "config", None)
            heads = heads or getattr(config, "num_attention_heads", None)
            parameters = parameters.named_parameters()
        named = parameters.items() if isinstance(parameters, Mapping) else parameters
        return self.draw(read_structure({n: _shape(p) for n, p in named}, heads, self.patterns))

    def draw(self, structure: Structure) -> HalfPlan:
        """Draw a round of a model whose structure is read already."""
        sizes: dict[Unit, int] = {}
        for piece in structure.pieces:
            sizes[piece.unit] = sizes.get(piece.unit, 0) + structure.entries(piece)
        live = {name: Live("all") for name in structure.shapes}
        if self.whole:
            chosen = draw_units(sizes, self.level, self.ratio, self.balance, self.seed)
            live.update(_whole(structure, chosen))
        else:
            chosen = set(sizes)
            live.update(_finer(structure, self.level, self.ratio))
        units = {_unit_name(unit): unit in chosen for unit in sorted(sizes)}
        return HalfPlan(self, structure.shapes, live, units, structure.always)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else tuple(value)


def _check_role(role: str) -> None:
    category, _, parts = role.partition(".")
    if role != "norm" and (category not in ("attention", "mlp") or not parts):
        raise ValueError(
            f"patterns: got role {role!r}, want 'norm', or 'attention.' or 'mlp.' and a part"
        )


def _unit_name(unit: Unit) -> str:
    block = ".".join(map(str, unit.block))
    return f"{block} {'.'.join(map(str, (*unit.group, unit.part)))}"


def _whole(structure: Structure, chosen: set[Unit]) -> dict[str, Live]:
    """By parameter: all, nothing, or the lines of the parts that learn."""
    by_parameter: dict[str, list[Piece]] = {}
    for piece in structure.pieces:
        by_parameter.setdefault(piece.parameter, []).append(piece)
    live = {}
    for name, pieces in by_parameter.items():
        learning = [piece for piece in pieces if piece.unit in chosen]
        axis = pieces[0].axis
        if not learning or len(learning) == len(pieces) or axis is None:
            live[name] = Live("all" if learning else "none")
        else:
            ranges = _merged([bounds for piece in learning for bounds in piece.lines])
            count = sum(stop - start for start, stop in ranges)
            live[name] = Live(axis, ranges, count=count)
    return live


def _merged(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def _finer(structure: Structure, level: str, ratio: float) -> dict[str, Live]:
    """Half of every parameter of a unit; equally many lines in one module share a draw."""
    ids: dict[object, int] = {}
    live = {}
    for name in sorted({piece.parameter for piece in structure.pieces}):
        shape = structure.shapes[name]
        rows, columns = matrix_of(shape, level)
        extent = {"rows": rows, "columns": columns}.get(level)
        mask_id = ids.setdefault((module_of(name), extent or shape), len(ids))
        if extent is None:
            live[name] = Live("elements", mask_id=mask_id)
        else:
            live[name] = Live(level, mask_id=mask_id, count=math.floor(ratio * extent))
    return live
