"""The pilot of HFT: half of a tuned model's weights set back to the base (arXiv 2404.18466)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partune.selection.half.half import Half
from partune.selection.half.live import live_half
from partune.selection.half.plan import HalfPlan

Base = str | Path | Mapping[str, Tensor]


class HalfReset:
    """What `half_reset_` has overwritten, on the CPU."""

    def __init__(self, plan: HalfPlan, replaced: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        self.plan = plan
        self._replaced = replaced

    @property
    def entries(self) -> int:
        """How many weights were set back."""
        return sum(values.numel() for values, _ in self._replaced.values())

    @torch.no_grad()
    def undo_(self, model: nn.Module) -> None:
        """Put the tuned weights back, bit for bit.

        Raises:
            ValueError: a model without the parameters that were reset.
        """
        parameters = dict(model.named_parameters())
        missing = [name for name in self._replaced if name not in parameters]
        if missing:
            raise ValueError(
                f"model: got none of the name {missing[0]}, want the one that was reset"
            )
        for name, (values, positions) in self._replaced.items():
            _write(parameters[name], values, positions)


@torch.no_grad()
def half_reset_(
    model: nn.Module, base: Base, *, plan: Half | HalfPlan | None = None, seed: int = 0
) -> HalfReset:
    """Set the half of a tuned model that a plan would freeze back to its base, in place.

    The base's tensors are read one at a time, so that it is never whole in memory. Resetting with
    the same plan and the tuned checkpoint as `base` leads back to the tuned model too.

    Args:
        model: the tuned model.
        base: a safetensors file, a folder with model.safetensors or its shards and their index, or
            tensors by name.
        plan: which half; what it lets learn stays tuned. Default: `Half(seed)`.

    Returns:
        What was overwritten; its `undo_(model)` restores the tuned weights.

    Raises:
        ValueError: a base without a parameter that is reset, or with another shape; nothing has
            changed then.
        FileNotFoundError: a path without safetensors.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(
        ...     {name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})])})
        >>> base = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        >>> reset = half_reset_(model, base, seed=0)
        >>> sum(int((p == 0).all()) for p in model.parameters()), reset.entries
        (4, 40)
        >>> reset.undo_(model)
    """
    if not isinstance(plan, HalfPlan):
        plan = (Half(seed) if plan is None else plan).plan(model)
    parameters = dict(model.named_parameters())
    frozen = [name for name, live in plan.live.items() if live.kind != "all"]
    with _opened(base) as tensors:
        for name in frozen:
            _check(name, parameters, tensors)
        replaced: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name in frozen:
            parameter = parameters[name]
            positions = _frozen_positions(plan, name, parameter)
            source = tensors.read(name)
            old = _read(parameter.detach(), positions)
            _write(parameter, _read(source, positions).to(parameter), positions)
            replaced[name] = (old.cpu(), None if positions is None else positions.cpu())
    return HalfReset(plan, replaced)


def _frozen_positions(plan: HalfPlan, name: str, parameter: Tensor) -> Tensor | None:
    """Row-major places of what the plan freezes of a parameter; None: all of it."""
    half = live_half(plan, name, parameter)
    return None if half is None else (~half.mask(parameter)).flatten().nonzero().flatten()


def _read(value: Tensor, positions: Tensor | None) -> Tensor:
    flat = value.reshape(-1)
    return flat.clone() if positions is None else flat[positions.to(value.device)]


def _write(parameter: Tensor, values: Tensor, positions: Tensor | None) -> None:
    values = values.to(parameter.device)
    if positions is None:
        parameter.copy_(values.view(parameter.shape))
    else:
        flat = parameter.detach().reshape(-1).clone()
        flat[positions.to(parameter.device)] = values
        parameter.copy_(flat.view(parameter.shape))


def _check(name: str, parameters: Mapping[str, Tensor], tensors: _Tensors) -> None:
    if name not in parameters:
        raise ValueError(f"plan: got one of another model, which has {name}")
    shape = tensors.shape(name)
    if shape is None:
        raise ValueError(f"base: got no tensor {name}, want one for every parameter that is reset")
    if shape != tuple(parameters[name].shape):
        raise ValueError(f"base, {name}: got shape {shape}, want {tuple(parameters[name].shape)}")


class _Tensors:
    """Tensors by name, in memory or in open files."""

    def __init__(self, where: Mapping[str, Any]) -> None:
        self._where = where

    def shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self._where:
            return None
        holder = self._where[name]
        if isinstance(holder, Tensor):
            return tuple(holder.shape)
        return tuple(holder.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        holder = self._where[name]
        tensor: Tensor = holder if isinstance(holder, Tensor) else holder.get_tensor(name)
        return tensor


@contextmanager
def _opened(base: Base) -> Iterator[_Tensors]:
    if isinstance(base, Mapping):
        yield _Tensors(base)
        return
    from safetensors import safe_open

    with ExitStack() as stack:
        where = {}
        for file in _files(Path(base)):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            where.update(dict.fromkeys(opened.keys(), opened))
        yield _Tensors(where)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "model.safetensors.index.json").is_file():
        index = json.loads((path / "model.safetensors.index.json").read_text())
        return [path / name for name in sorted(set(index["weight_map"].values()))]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    raise FileNotFoundError(
        f"base: got {path}, want a safetensors file or a folder with model.safetensors"
    )
