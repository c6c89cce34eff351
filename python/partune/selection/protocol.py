"""What a selection is: it proposes scores, `topk_csr` alone turns them into a CSR."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

State: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """A score per entry, [rows, columns]; the k largest (or smallest) are selected.

    Example:
        >>> import torch
        >>> Scores(torch.ones(2, 3)).shape
        (2, 3)
    """

    values: Tensor
    largest: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)


@dataclass(frozen=True)
class Factors:
    """Scores |left @ right| that are never held: left [rows, r], right [r, columns].

    Example:
        >>> import torch
        >>> Factors(torch.ones(2, 1), torch.ones(1, 3)).shape
        (2, 3)
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0], self.right.shape[1])


Proposal: TypeAlias = Scores | Factors


@runtime_checkable
class Selection(Protocol):
    """Which entries of a matrix train; subclass it, or just have its three methods.

    `weight` and `grad` are one matrix [rows, columns] and its gradient (unscaled, negated where the
    optimizer maximizes). `state` is what `init` returned, and in it the optimizer keeps up to date
    `parameter_id`, the ordinal of the matrix, and `step`, the number of the step.

    Example:
        >>> import torch
        >>> from partune.selection import topk_csr
        >>> class Diagonal(Selection):
        ...     def propose(self, weight, grad, state):
        ...         return Scores(torch.eye(*weight.shape))
        >>> topk_csr(Diagonal().propose(torch.ones(2, 2), None, {}), 2)[1]
        tensor([0, 1], dtype=torch.int32)
    """

    def init(self, weight: Tensor) -> State:
        """The selection's own state for a matrix: plain values and tensors, which are saved."""
        return {}

    def observe_(self, weight: Tensor, grad: Tensor, state: State) -> None:
        """Take in the gradient of a step, before anything is selected or updated in it."""
        return None

    def propose(self, weight: Tensor, grad: Tensor | None, state: State) -> Proposal:
        """Score the entries; grad is None where `select()` is called without one."""
        ...


def observes(selection: Selection) -> bool:
    """Whether the selection looks at every step's gradient."""
    return getattr(type(selection), "observe_", None) is not Selection.observe_


def describe(selection: Selection) -> dict[str, Any]:
    """A selection as plain data, to tell in a checkpoint which one made it."""
    description: dict[str, Any] = {"type": type(selection).__qualname__}
    if is_dataclass(selection):
        for field in fields(selection):
            value = getattr(selection, field.name)
            plain = isinstance(value, bool | int | float | str) or value is None
            description[field.name] = value if plain else repr(value)
    return description


def needs_gradient(selection: Selection, grad: Tensor | None) -> Tensor:
    """The gradient; ValueError where there is none."""
    if grad is None:
        raise ValueError(
            f"{type(selection).__name__} selects by gradients and got none: "
            "call it after backward(), before zero_grad()"
        )
    return grad
