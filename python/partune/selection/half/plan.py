"""A round of HFT as data: what of every parameter learns, in print and as JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partune.selection.half.draw import draw_lines
from partune.selection.half.naming import matrix_of

if TYPE_CHECKING:
    from partune.selection.half.half import Half

KINDS = ("all", "none", "rows", "columns", "elements")


@dataclass(frozen=True)
class Live:
    """What of one parameter learns.

    `kind` is "all", "none", "rows", "columns" or "elements". Rows and columns are those of the
    matrix that the parameter is seen as: given as ranges, or `count` of them drawn under `mask_id`.
    Elements are drawn under `mask_id`, each with probability 1/2.
    """

    kind: str
    ranges: tuple[tuple[int, int], ...] = ()
    mask_id: int | None = None
    count: int = 0

    def entries(self, shape: tuple[int, ...]) -> int:
        """How many entries learn; of elements, how many are expected to."""
        total = math.prod(shape)
        if self.kind in ("all", "none"):
            return total if self.kind == "all" else 0
        if self.kind == "elements":
            return total // 2
        rows, columns = matrix_of(shape, self.kind)
        return self.count * (columns if self.kind == "rows" else rows)

    def lines(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """The live rows or columns, ascending int32, on the CPU."""
        if self.mask_id is None:
            ranges = [torch.arange(*bounds, dtype=torch.int32) for bounds in self.ranges]
            return torch.cat(ranges)
        rows, columns = matrix_of(shape, self.kind)
        return draw_lines(rows if self.kind == "rows" else columns, self.count, seed, self.mask_id)


@dataclass(frozen=True)
class HalfPlan:
    """Which parameters, or which parts of them, learn in a round.

    Made by `Half.plan`; prints what learns; equal plans have equal digests on every machine.

    Example:
        >>> from partune.selection import Half
        >>> plan = Half(seed=0).plan({f"layers.0.attn.{m}.weight": (4, 4) for m in
        ...     ("q_proj", "k_proj", "v_proj", "o_proj")})
        >>> plan.live_entries, HalfPlan.from_json(plan.to_json()) == plan
        (32, True)
    """

    half: Half
    shapes: dict[str, tuple[int, ...]]
    live: dict[str, Live]
    units: dict[str, bool]  # by the units' names, in order: whether they learn (finer levels: all)
    always: tuple[str, ...]

    @property
    def live_entries(self) -> int:
        return sum(live.entries(self.shapes[name]) for name, live in self.live.items())

    @property
    def entries(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def share(self) -> float:
        """Of all parameters, those that learn."""
        return self.live_entries / max(self.entries, 1)

    def digest(self) -> str:
        """SHA-256 of the plan's JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as JSON, the same text for the same plan."""
        parameters = {
            name: {"shape": list(self.shapes[name]), **_plain(live)}
            for name, live in self.live.items()
        }
        return json.dumps(
            {
                "half": asdict(self.half),
                "parameters": parameters,
                "units": self.units,
                "always": self.always,
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> HalfPlan:
        """Read a plan.

        Raises:
            ValueError: text that is no plan.
        """
        from partune.selection.half.half import Half

        try:
            read = json.loads(text)
            options = read["half"]
            half = Half(**{**options, "patterns": tuple(map(tuple, options["patterns"]))})
            parameters = read["parameters"]
            shapes = {name: tuple(entry.pop("shape")) for name, entry in parameters.items()}
            live = {name: _live(entry) for name, entry in parameters.items()}
            return cls(half, shapes, live, read["units"], tuple(read["always"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"plan: got JSON that is no plan of HFT ({error!r})") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> HalfPlan:
        """Read a plan that `save` wrote."""
        return cls.from_json(Path(path).read_text())

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        half = self.half
        yield (
            f"HFT, level {half.level}, seed {half.seed}: {self.live_entries:,} of "
            f"{self.entries:,} parameters learn ({self.share:.1%})"
        )
        blocks: dict[str, list[str]] = {}
        for name, live in self.units.items():
            block, _, part = name.rpartition(" ")
            blocks.setdefault(block, [])
            if live:
                blocks[block].append(part)
        for block, parts in blocks.items():
            what = ", ".join(parts) if half.whole else f"half of the {half.level} of all matrices"
            yield f"{block}: {what or 'nothing'}"
        if self.always:
            yield f"always: {', '.join(self.always)}"


def _plain(live: Live) -> dict[str, Any]:
    """The fields that aren't at their defaults."""
    plain: dict[str, Any] = {"kind": live.kind}
    if live.ranges:
        plain["ranges"] = [list(bounds) for bounds in live.ranges]
    if live.mask_id is not None:
        plain["mask_id"] = live.mask_id
    if live.count:
        plain["count"] = live.count
    return plain


def _live(entry: dict[str, Any]) -> Live:
    live = Live(**entry)
    if live.kind not in KINDS:
        raise ValueError(f"plan: got kind {live.kind!r}, want one of {', '.join(KINDS)}")
    return replace(live, ranges=tuple((int(a), int(b)) for a, b in live.ranges))
