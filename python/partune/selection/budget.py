"""How many entries of a parameter are selected: its matrices, and the budget for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

Block: TypeAlias = tuple[int, int]  # rows and columns that are selected as one


class DefaultDensity(float):
    """The density of who named none, told apart from the same number when named."""


DEFAULT_DENSITY = DefaultDensity(0.05)


@dataclass(frozen=True)
class Layout:
    """A parameter as the matrices that are selected from: `slices` of [rows, columns]."""

    slices: int
    rows: int
    columns: int

    @classmethod
    def of(cls, parameter: Tensor) -> Layout:
        """Two dimensions: a matrix; three: stacked experts; more: a convolution, (out, rest)."""
        shape = tuple(parameter.shape)
        if len(shape) == 3:
            return cls(*shape)
        return cls(1, shape[0], math.prod(shape[1:]))

    @property
    def entries(self) -> int:
        return self.rows * self.columns

    def matrices(self, value: Tensor) -> tuple[Tensor, ...]:
        """The slices of a parameter or of its gradient."""
        value = value.detach()
        if value.dim() == 2:
            return (value,)
        return value.reshape(self.slices, self.rows, self.columns).unbind()

    def matrix(self, value: Tensor) -> Tensor:
        """All slices below one another."""
        return value if value.dim() == 2 else value.reshape(-1, self.columns)

    def selected_per_slice(self, group: Mapping[str, Any]) -> int:
        """k: floor(density·rows·columns), or what a LoRA of rank `budget_rank` has, at most all.

        Of blocks, as many as are whole.
        """
        if group["budget_rank"] is not None:
            k = min((self.rows + self.columns) * int(group["budget_rank"]), self.entries)
        else:
            k = math.floor(float(group["density"]) * self.entries)
        block: Block = group["block"]
        return k - k % (block[0] * block[1])

    def check_divided_by(self, block: Block) -> None:
        """Refuse blocks that don't divide a slice.

        Raises:
            ValueError: rows or columns that blocks don't divide.
        """
        if self.rows % block[0] or self.columns % block[1]:
            raise ValueError(
                f"block: got {block} for a matrix of {self.rows}x{self.columns}, want rows and "
                "columns that divide it; leave the matrix out, or select it by other blocks"
            )


def settle_budget(group: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Leave exactly one of density and budget_rank set, the group's own before the defaults."""
    density, budget_rank = group.get("density"), group.get("budget_rank")
    if density is None and budget_rank is None:
        density, budget_rank = defaults["density"], defaults["budget_rank"]
    if budget_rank is not None and density is not None and not isinstance(density, DefaultDensity):
        raise ValueError(
            f"density, budget_rank: got both ({density} and {budget_rank}), want one of them"
        )
    group["density"] = None if budget_rank is not None or density is None else float(density)
    group["budget_rank"] = budget_rank


def check_block(block: object) -> None:
    if not (
        isinstance(block, tuple)
        and len(block) == 2
        and all(type(size) is int and size >= 1 for size in block)
    ):
        raise ValueError(f"block: got {block!r}, want rows and columns, such as (4, 4)")


def check_budget(density: float | None, budget_rank: int | None) -> None:
    if budget_rank is None:
        if density is None or not 0.0 < density <= 1.0:
            raise ValueError(f"density: got {density}, want 0 < density <= 1")
    elif not isinstance(budget_rank, int) or isinstance(budget_rank, bool) or budget_rank < 1:
        raise ValueError(f"budget_rank: got {budget_rank!r}, want an int of at least 1")
