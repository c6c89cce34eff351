"""merge and unmerge: fold an adapter into the weights of the plain layers, and take it out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from partune.nn._layers import AdaptedLayer, base_state, restore, write
from partune.nn._registry import (
    Adapter,
    AdapterConfig,
    Placement,
    add_adapter,
    attached,
    detach,
    forget_merged,
    lock_merged,
    registry_of,
)

_BIAS_FLAGS = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "bias")  # of transformers


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did.

    Attributes:
        layers: how many were changed.
        largest_drift: largest |difference| of the outputs on the batch; None without a batch.
        relative_drift: the same, relative to the largest |output|.
        biases: names of those that were created.
    """

    layers: int
    largest_drift: float | None
    relative_drift: float | None
    biases: tuple[str, ...]


@dataclass
class Merged:
    """What `unmerge` needs: the adapter as a plan, and what of the base can't be told otherwise."""

    name: str
    config: AdapterConfig
    plan: dict[str, Placement]
    overwritten: dict[str, dict[str, Tensor | None]]  # by layer; None: created by the merge
    flags: tuple[str, ...]  # of the model's config


def merge(
    model: nn.Module, batch: Any = None, *, name: str | None = None, keep: str | None = None
) -> MergeReport:
    """Fold an adapter into the base's weights, in float32: the plain model then computes the same.

    The layers get their own classes back and nothing of the adapter is left over, so the model
    saves, loads and runs as any of its kind. A bias is created where a shift needs one: in a
    transformers model only if its config can say so (`attention_bias` and the like, which are then
    set), because `from_pretrained` drops what the config doesn't know. `detach` before merging
    gives the base back; afterwards only `unmerge` does, if something was kept for it.

    Args:
        batch: to measure the drift with, in eval mode: a tensor, a tuple of positional or a mapping
            of keyword arguments. None: not measured.
        name: of the adapter, the only one attached; None: that one.
        keep: for `unmerge`, outside of the state_dict: "original", the weights as they were, which
            come back bit for bit; "adapter", the adapter alone, which takes next to no memory and
            is subtracted again, exact but for rounding (a SparseConfig's: bit for bit); None:
            nothing.

    Raises:
        ValueError: no adapter or several; a shift where no bias can be (RMSNorm, a layer whose bias
            the config can't express); BatchNorm in training mode; a weight that is quantised or
            shared with another module; a layer whose own forward doesn't follow its weight;
            keep="adapter" for one that can't be subtracted (SSF's). Then nothing is changed.

    Reference: Scaling & Shifting Your Features (arXiv 2210.08823), section 3.3; LoRA (arXiv
    2106.09685), section 4.1.

    Example:
        >>> from partune.nn import ScaleShiftConfig, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 8)), ScaleShiftConfig())
        >>> merge(model, torch.ones(2, 4)).relative_drift < 1e-5
        True
    """
    if keep not in (None, "original", "adapter"):
        raise ValueError(f"keep: got {keep!r}, want 'original', 'adapter' or None")
    name, adapter = attached(model, name)
    registry = registry_of(model)
    assert registry is not None
    if len(registry.adapters) > 1:
        raise ValueError(
            f"name: {sorted(registry.adapters)} are attached, want one; detach the others first"
        )
    if registry.active is None:
        raise ValueError(f"name: {name!r} is not active; call set_adapter(model, {name!r}) first")
    merged = {layer_name: _merged(model, layer_name) for layer_name in adapter.holders}
    refuse_shared(model, [name for name, parameters in merged.items() if parameters])
    created = _created(model, merged)
    flags, zeros = expressed(model, created) if created else ((), [])
    layers = len(merged)
    for bias in zeros:
        layer_name = bias.removesuffix(".bias")
        size = len(model.get_parameter(f"{layer_name}.weight"))
        merged.setdefault(layer_name, {})["bias"] = torch.zeros(size)
    kept = None if keep is None else _kept(model, name, adapter, merged, flags, keep)
    before = None if batch is None else _outputs(model, batch)
    for layer_name in adapter.layers:
        _layer(model, layer_name).settle()
    detach(model)
    for layer_name, parameters in merged.items():
        write(model.get_submodule(layer_name), parameters)
    for flag in flags:
        setattr(model.config, flag, True)
    if kept is not None:
        lock_merged(model, registry, kept)
    drift, relative = (None, None) if before is None else _drift(before, _outputs(model, batch))
    return MergeReport(layers, drift, relative, (*created, *zeros))


def unmerge(model: nn.Module, batch: Any = None) -> MergeReport:
    """Take a merged adapter out of the weights again; it is attached and active as before.

    With what `merge` kept: keep="original" gives the base back bit for bit, keep="adapter"
    subtracts in float32, which leaves the rounding of the weights' dtype, twice.

    Args:
        batch: to measure the drift between merged and unmerged with, as for `merge`.

    Returns:
        What changed; `biases` are those that were removed.

    Raises:
        ValueError: nothing is merged, or nothing was kept.

    Example:
        >>> from partune.nn import BlockLoRAConfig, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 8)), BlockLoRAConfig())
        >>> report = merge(model, keep="original")
        >>> unmerge(model).layers
        1
    """
    registry = registry_of(model)
    if registry is None or registry.merged is None:
        raise ValueError(
            f"model: got a {type(model).__name__} into which nothing is merged; only "
            "merge(model, keep='original') or keep='adapter' can be undone"
        )
    merged: Merged = registry.merged
    values = dict(merged.overwritten)
    for layer_name, placement in merged.plan.items():
        module = model.get_submodule(layer_name)
        if placement.adapter is not None:
            placement.adapter.to(next(module.parameters()).device)
            if layer_name not in values:
                values[layer_name] = {**placement.layer.subtracted(module, placement.adapter)}
    before = None if batch is None else _outputs(model, batch)
    for layer_name, parameters in values.items():
        restore(model.get_submodule(layer_name), parameters)
    for flag in merged.flags:
        setattr(model.config, flag, False)
    forget_merged(model)
    add_adapter(model, merged.config, merged.name, merged.plan, registry.fingerprint)
    drift, relative = (None, None) if before is None else _drift(before, _outputs(model, batch))
    removed = [f"{n}.{p}" for n, of in values.items() for p, value in of.items() if value is None]
    layers = sum(placement.adapter is not None for placement in merged.plan.values())
    return MergeReport(layers, drift, relative, tuple(removed))


def _kept(
    model: nn.Module,
    name: str,
    adapter: Adapter,
    merged: Mapping[str, Mapping[str, Tensor]],
    flags: tuple[str, ...],
    keep: str,
) -> Merged:
    """What `unmerge` will need: with keep="adapter" none of what can be subtracted from."""
    plan = {}
    for layer_name, layer in adapter.layers.items():
        module = model.get_submodule(layer_name)
        own = getattr(module, layer.children_name)[name] if layer.children_name else None
        plan[layer_name] = Placement(layer, own)
    overwritten: dict[str, dict[str, Tensor | None]] = {}
    for layer_name, parameters in merged.items():
        module = model.get_submodule(layer_name)
        replaced = layer_name not in plan or plan[layer_name].layer.replaces
        if keep == "original" or replaced:
            before = {parameter: getattr(module, parameter) for parameter in parameters}
            overwritten[layer_name] = {
                parameter: None if value is None else value.detach().clone()
                for parameter, value in before.items()
            }
        elif not plan[layer_name].layer.subtracts:
            raise ValueError(
                f"keep: got 'adapter', but what a {type(adapter.config).__name__}'s adapter did to "
                f"{layer_name} can't be subtracted; want 'original'"
            )
    return Merged(name, adapter.config, plan, overwritten, flags)


def _layer(model: nn.Module, name: str) -> AdaptedLayer:
    layer = model.get_submodule(name)
    assert isinstance(layer, AdaptedLayer)
    return layer


def _merged(model: nn.Module, name: str) -> dict[str, Tensor]:
    try:
        return _layer(model, name).merged()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _created(model: nn.Module, merged: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """The parameters that the plain layers don't have yet."""
    return [
        f"{layer_name}.{parameter}"
        for layer_name, parameters in merged.items()
        for parameter in parameters
        if getattr(model.get_submodule(layer_name), parameter) is None
    ]


def refuse_shared(model: nn.Module, names: Iterable[str]) -> None:
    """Weights that another module reads too would change there as well."""
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    for name in names:
        for key, parameter in model.get_submodule(name).named_parameters(recurse=False):
            if len(owners[parameter]) > 1:
                raise ValueError(
                    f"{name}: its {key} is shared with another module, which merging would change; "
                    "leave the adapter unmerged"
                )


def expressed(model: nn.Module, created: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """The config's flags with which a transformers model has the created parameters.

    And the further biases that it then has. The model is built on the meta device to know; a
    module without a config, or whose config needs no flag, takes any.
    """
    config = getattr(model, "config", None)
    if not hasattr(model, "save_pretrained") or not hasattr(config, "to_dict"):
        return (), []
    wanted = {*base_state(model), *created}
    off = [flag for flag in _BIAS_FLAGS if getattr(config, flag, None) is False]
    for count in range(len(off) + 1):
        for flags in combinations(off, count):
            trial = copy.deepcopy(config)
            for flag in flags:
                setattr(trial, flag, True)
            with torch.device("meta"):
                keys = set(type(model)(trial).state_dict())
            further = sorted(keys - wanted)
            if wanted <= keys and all(key.endswith(".bias") for key in further):
                return flags, further
    raise ValueError(
        f"{created[0]}: the config of a {type(model).__name__} can't express this bias, and "
        "from_pretrained would drop it; train with shift=False, or leave the adapter unmerged"
    )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    with _eval_mode(model):
        if isinstance(batch, Mapping):
            return list(_tensors(model(**batch)))
        return list(_tensors(model(*batch) if isinstance(batch, tuple) else model(batch)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _drift(before: list[Tensor], after: list[Tensor]) -> tuple[float, float]:
    """Largest |difference|, and largest relative to the largest |output| of the same tensor."""
    pairs = [(old.double(), new.double()) for old, new in zip(before, after, strict=True)]
    pairs = [(old, new) for old, new in pairs if old.numel() > 0]
    largest = [float((new - old).abs().amax()) for old, new in pairs]
    sizes = [float(old.abs().amax()) for old, _ in pairs]
    relative = [d / size if size else d for d, size in zip(largest, sizes, strict=True)]
    return max(largest, default=0.0), max(relative, default=0.0)
