"""What the parameters of a transformer are, by their names: blocks, matrices, norms."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

# What a module in a block is, by how its path ends; the longest ending counts. Several parts lie in
# one matrix, one after another along its outputs, or in turn within each head.
_ATTENTION = {
    # Llama, Qwen, Mistral, Gemma, ViT; Phi's output; GPT-J, CLIP and OPT
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "self_attn.dense": "o",
    "out_proj": "o",
    # BERT and earlier ViT; DistilBERT
    "query": "q", "key": "k", "value": "v", "attention.output.dense": "o",
    "q_lin": "q", "k_lin": "k", "v_lin": "v", "out_lin": "o",
    # Llama's own code
    "wq": "q", "wk": "k", "wv": "v", "wo": "o",
    # fused: Phi-3, GPT-2, GPT-NeoX, timm, nn.MultiheadAttention
    "qkv_proj": "q+k+v", "c_attn": "q+k+v", "attn.c_proj": "o",
    "query_key_value": "heads:q+k+v", "attention.dense": "o", "attn.qkv": "q+k+v",
    "attn.proj": "o", "self_attn.in_proj": "q+k+v", "attn.in_proj": "q+k+v",
}  # fmt: skip
_MLP = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate+up",
    "fc1": "up", "fc2": "down", "c_fc": "up", "mlp.c_proj": "down", "fc_in": "up",
    "fc_out": "down", "dense_h_to_4h": "up", "dense_4h_to_h": "down",
    "intermediate.dense": "up", "output.dense": "down", "lin1": "up", "lin2": "down",
    "linear1": "up", "linear2": "down",
    # Mixtral's experts in their published form, Llama's own code
    "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip
_ROLES = {
    **{ending: f"attention.{parts}" for ending, parts in _ATTENTION.items()},
    **{ending: f"mlp.{parts}" for ending, parts in _MLP.items()},
}
_BLOCK = re.compile(r"^((?:[^.]+\.)*?[^.]+\.\d+)\.(.+)$")
_EXPERT = re.compile(r"(?:^|\.)((?:shared_)?experts?(?:\.\d+)?)\.")
_CROSS = re.compile(r"(?:^|\.)(crossattention|cross_attn|encoder_attn|EncDecAttention)\.")
_NORM = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)
_CONV1D = re.compile(r"(?:^|\.)(c_attn|c_proj|c_fc)$")  # GPT-2 stores its matrices [in, out]

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, order=True)
class Unit:
    """What is drawn as one: a matrix with its bias, or a norm with its weight and bias."""

    block: tuple[str | int, ...]  # path, numbers as numbers so that 10 sorts after 9
    category: str  # "attention", "mlp" or "norm"
    group: tuple[str | int, ...]  # which attention or MLP of the block: an expert, cross-attention
    part: str  # "q", "gate", …, a norm's path

    def __str__(self) -> str:
        return ".".join(map(str, (*self.block, *self.group, self.part)))


@dataclass(frozen=True)
class Piece:
    """A unit's share of one parameter: all of it, or lines [start, stop) of its matrix."""

    parameter: str
    unit: Unit
    axis: str | None = None  # None: all of it; else "rows" or "columns"
    lines: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Structure:
    """The pieces of a model, and the parameters outside of all units, which always learn."""

    shapes: dict[str, tuple[int, ...]]
    pieces: tuple[Piece, ...]
    always: tuple[str, ...]

    def entries(self, piece: Piece) -> int:
        shape = self.shapes[piece.parameter]
        total = math.prod(shape)
        if piece.axis is None:
            return total
        rows, columns = matrix_of(shape, piece.axis)
        return sum(stop - start for start, stop in piece.lines) * (
            columns if piece.axis == "rows" else rows
        )


def matrix_of(shape: Sequence[int], axis: str) -> tuple[int, int]:
    """A parameter as rows and columns: stacked experts row after row, a vector as its lines."""
    if len(shape) == 1:
        return (shape[0], 1) if axis == "rows" else (1, shape[0])
    if len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    return shape[0], math.prod(shape[1:])


def module_of(name: str) -> str:
    """The path of a parameter's module; a bias has that of its matrix."""
    return re.sub(r"[._](weight|bias)$", "", name)


def read_structure(
    shapes: Shapes, heads: int | None, patterns: Iterable[tuple[str, str]] = ()
) -> Structure:
    """Find the units of a model.

    Args:
        shapes: by the parameters' names, each parameter once.
        heads: of attention, for matrices that hold q, k and v in turn within each head.
        patterns: (regular expression, role) for modules of other names: the expression matches a
            module's path inside its block, and "attention.q", "mlp.gate+up" or "norm" tells what
            it is.

    Raises:
        ValueError: no attention or MLP matrix is recognised, or a fused matrix can't be split.
    """
    given = [(re.compile(pattern), role) for pattern, role in patterns]
    sizes = {name: tuple(shape) for name, shape in shapes.items()}
    places = {name: _place(name, given) for name in sizes}
    widths = _query_widths(sizes, places)
    pieces: list[Piece] = []
    for name, place in places.items():
        if place is not None:
            pieces += _pieces(name, sizes[name], *place, widths, heads)
    if not any(piece.unit.category != "norm" for piece in pieces):
        raise ValueError(
            f"model: no attention or MLP matrix has a name that is known, among "
            f"{', '.join(list(sizes)[:6])}, …; tell them by patterns=((regular expression, "
            '"attention.q"), …)'
        )
    known = {piece.parameter for piece in pieces}
    always = tuple(name for name in sizes if name not in known)
    pieces.sort(key=lambda piece: (piece.unit, piece.parameter))
    return Structure(sizes, tuple(pieces), always)


_Place = tuple[tuple[str | int, ...], str, str]  # block, path in the block, role


def _place(name: str, given: Sequence[tuple[re.Pattern[str], str]]) -> _Place | None:
    inside = _BLOCK.match(name)
    if inside is None:
        return None
    path = module_of(inside[2])
    role = next((role for pattern, role in given if pattern.fullmatch(path)), None) or _role(path)
    return None if role is None else (_numbered(inside[1]), path, role)


@cache
def _role(path: str) -> str | None:
    endings = [e for e in _ROLES if path == e or path.endswith("." + e)]
    if endings:
        return _ROLES[max(endings, key=len)]
    return "norm" if _NORM.search(path.rpartition(".")[2]) else None


def _numbered(path: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))


def _group(path: str) -> tuple[str | int, ...]:
    found = _EXPERT.search(path) or _CROSS.search(path)
    return _numbered(found[1]) if found else ()


def _query_widths(shapes: Shapes, places: Mapping[str, _Place | None]) -> dict[object, int]:
    """By block and attention: how wide q is, from the output matrix that takes as many inputs."""
    widths: dict[object, int] = {}
    for name, place in places.items():
        if place is not None and place[2] == "attention.o" and len(shapes[name]) == 2:
            block, path, _ = place
            inputs = 0 if _CONV1D.search(path) else 1
            widths[block, _group(path)] = shapes[name][inputs]
    return widths


def _pieces(
    name: str,
    shape: tuple[int, ...],
    block: tuple[str | int, ...],
    path: str,
    role: str,
    widths: Mapping[object, int],
    heads: int | None,
) -> list[Piece]:
    if role == "norm":
        return [Piece(name, Unit(block, "norm", (), path))]
    category, _, parts = role.partition(".")
    in_heads, parts = parts.startswith("heads:"), parts.removeprefix("heads:")
    group, names = _group(path), parts.split("+")
    stacked = len(shape) == 3
    if len(names) == 1 and not stacked:
        return [Piece(name, Unit(block, category, group, parts))]
    axis = "columns" if _CONV1D.search(path) else "rows"
    slices = shape[0] if stacked else 1
    outputs = shape[1] if stacked else matrix_of(shape, axis)[axis == "columns"]
    sizes = _part_sizes(name, names, outputs, widths.get((block, group)))
    pieces = []
    for number in range(slices):
        start = number * outputs
        for part, size in zip(names, sizes, strict=True):
            lines: tuple[tuple[int, int], ...] = ((start, start + size),)
            if in_heads:
                lines = _lines_in_heads(name, names.index(part), len(names), outputs, heads)
            unit = Unit(block, category, (*group, number) if stacked else group, part)
            pieces.append(Piece(name, unit, axis, lines))
            start += size
    return pieces


def _part_sizes(name: str, parts: Sequence[str], outputs: int, query: int | None) -> list[int]:
    """How many outputs each part has: q as many as the output matrix takes, k and v the rest."""
    if parts == ["q", "k", "v"] and query is not None and query < outputs:
        if (outputs - query) % 2 == 0:
            return [query, (outputs - query) // 2, (outputs - query) // 2]
    elif outputs % len(parts) == 0:
        return [outputs // len(parts)] * len(parts)
    raise ValueError(
        f"{name}: got {outputs} outputs, which don't divide into {', '.join(parts)}; "
        "tell what it is by patterns="
    )


def _lines_in_heads(
    name: str, part: int, parts: int, outputs: int, heads: int | None
) -> tuple[tuple[int, int], ...]:
    if heads is None or outputs % (heads * parts):
        raise ValueError(
            f"{name}: got {heads} heads for {outputs} outputs, want the model with its config, "
            "whose num_attention_heads tells how q, k and v take turns"
        )
    width = outputs // (heads * parts)
    starts = [(head * parts + part) * width for head in range(heads)]
    return tuple((start, start + width) for start in starts)
