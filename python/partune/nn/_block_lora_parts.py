"""Where the parts of a fused layer lie: q, k and v in a qkv, gate and up in a gate_up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from partune.nn._block_lora_layers import BlockLoRALayer, layer_for
from partune.nn._layers import base_modules
from partune.nn._targets import is_conv1d
from partune.selection.half.naming import Structure, read_structure

Parts = Sequence[str] | Mapping[str, tuple[int, int]]


def rows_of_parts(model: nn.Module, wanted: Mapping[str, Parts]) -> dict[str, dict[str, Tensor]]:
    """Which outputs of which layers the wanted parts have, by name or as [start, stop)."""
    structure = None
    rows = {}
    for name, parts in wanted.items():
        if isinstance(parts, Mapping):
            rows[name] = _rows_as_given(model, name, parts)
            continue
        say = f"say which rows they are, such as parts={{{name!r}: {{{parts[0]!r}: (0, 64)}}}}"
        try:
            structure = structure or _structure(model)
        except ValueError as error:
            raise ValueError(f"parts: {error.args[0].partition(';')[0]}; {say}") from None
        found = _rows_by_part(structure, f"{name}.weight")
        unknown = [part for part in parts if part not in found]
        if unknown:
            raise ValueError(
                f"parts: got {unknown[0]!r} for {name}, whose parts are known as "
                f"{', '.join(found) or 'none'}; {say}"
            )
        rows[name] = {part: found[part] for part in parts}
    return rows


def _rows_as_given(
    model: nn.Module, name: str, parts: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    layer = layer_for(model.get_submodule(name))
    assert layer is not None
    out = layer.features(model.get_submodule(name))[1]
    for part, (start, stop) in parts.items():
        if not 0 <= start < stop <= out:
            raise ValueError(
                f"parts: got rows [{start}, {stop}) for {part} of {name}, want some of its {out}"
            )
    for (_, stop), (start, _) in pairwise(sorted(parts.values())):
        if start < stop:
            raise ValueError(f"parts: row {start} of {name} is in two of {', '.join(parts)}")
    return {part: torch.arange(start, stop) for part, (start, stop) in parts.items()}


def _rows_by_part(structure: Structure, parameter: str) -> dict[str, Tensor]:
    """Of a fused layer, each part's rows; the parts in their order. Empty for any other."""
    fused = [p for p in structure.pieces if p.parameter == parameter and p.axis is not None]
    return {
        piece.unit.part: torch.cat([torch.arange(*lines) for lines in piece.lines])
        for piece in sorted(fused, key=lambda piece: piece.lines)
    }


def _structure(model: nn.Module) -> Structure:
    config = getattr(model, "config", None)
    return read_structure(_shapes(model), getattr(config, "num_attention_heads", None))


def _shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Of the linear layers' weights, quantised ones too, as their layers store them."""
    shapes = {}
    for name, module in base_modules(model):
        layer: type[BlockLoRALayer] | None = layer_for(module)
        if layer is not None:
            inputs, outputs = layer.features(module)
            shape = (inputs, outputs) if is_conv1d(module) else (outputs, inputs)
            shapes[f"{name}.weight"] = shape
    return shapes
