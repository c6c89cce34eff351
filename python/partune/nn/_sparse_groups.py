"""Sparse layers that read one tensor, such as q, k and v, or gate and up, are computed together.

Which do is seen in the first forward that trains: layers that are called with the very same tensor.
From the optimizer's next step on the first of them computes them all, as one node of the graph, and
keeps the others' outputs until they are called: the input is read once, and its gradient needn't be
added up from several. Groups change at steps of the optimizer alone, so that a checkpoint computes
again what it computed before.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from partune.ops._autocast import autocast_dtype

if TYPE_CHECKING:
    from partune.nn._sparse_layers import SparseLayer

# In a layer's `__dict__`, and in no copy's: its group, None if it has none, or the layers that were
# seen with its input so far.
KEY = "reads_with"

_readers: Any = WeakTensorKeyDictionary()


def output_of(layer: SparseLayer, input: Tensor) -> Tensor:
    """A layer's output, in a forward that autograd follows."""
    group = layer.__dict__.get(KEY, ())
    if isinstance(group, Group):
        return group.output_of(layer, input)
    if group is not None:
        seen = _readers.get(input)
        if seen is None or any(reference() is layer for reference in seen):
            _readers[input] = seen = []
        seen.append(weakref.ref(layer))
        layer.__dict__[KEY] = seen
    (alone,) = layer.compute([layer], input)
    return alone


def regroup(layers: Iterable[SparseLayer]) -> None:
    """At a step of the optimizer: form the groups that were seen, give up those that failed."""
    for layer in layers:
        group = layer.__dict__.get(KEY, ())
        if isinstance(group, Group):
            if group.failed or group.outputs:
                group.dissolve()
        elif group:
            members = [reference() for reference in group]
            together = len(members) > 1 and all(
                member is not None
                and member.__dict__.get(KEY) is group
                and member.transposed == layer.transposed
                for member in members
            )
            if together:
                Group(members)
            else:
                layer.__dict__[KEY] = None


def leave(layer: SparseLayer) -> None:
    """Before a layer computes something else: its group ends, and may be formed anew."""
    group = layer.__dict__.pop(KEY, None)
    if isinstance(group, Group):
        for member in group.members:
            member.__dict__.pop(KEY, None)


class Group:
    """Layers in the order of their calls."""

    def __init__(self, members: Sequence[SparseLayer]) -> None:
        self.members = members
        self.failed = False  # its layers aren't always called together
        self.input: Tensor | None = None
        self.state: tuple[int, torch.dtype | None] = (0, None)  # its version, and autocast's dtype
        self.outputs: dict[SparseLayer, Tensor] = {}  # of that input, which weren't asked for yet
        for member in members:
            member.__dict__[KEY] = self

    def output_of(self, layer: SparseLayer, input: Tensor) -> Tensor:
        state = input._version, autocast_dtype(input)
        if self.input is input and self.state == state and layer in self.outputs:
            output = self.outputs.pop(layer)
        elif layer is self.members[0] and not any(map(_is_prepared, self.members)):
            self.failed |= bool(self.outputs)
            outputs = layer.compute(self.members, input)
            self.outputs = dict(zip(self.members, outputs, strict=True))
            self.input, self.state = input, state
            output = self.outputs.pop(layer)
        else:
            self.failed = True
            (output,) = layer.compute([layer], input)
        if not self.outputs:
            self.input = None
        return output

    def dissolve(self) -> None:
        """For good: its layers compute by themselves."""
        self.outputs.clear()
        self.input = None
        for member in self.members:
            member.__dict__[KEY] = None


def _is_prepared(layer: SparseLayer) -> bool:
    """Whether something happens before a layer's own forward, such as fetching its weight."""
    return bool(layer._forward_pre_hooks) or "forward" in layer.__dict__
