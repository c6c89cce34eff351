"""save_adapter and load_adapter: one safetensors file, tied to the base that it was trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from partune.nn._block_lora_config import BlockLoRAConfig
from partune.nn._layers import TrainedCopy
from partune.nn._registry import (
    AdapterConfig,
    Placement,
    add_adapter,
    attached,
    fingerprint,
    planned,
)
from partune.nn._scale_shift_config import ScaleShiftConfig
from partune.nn._sparse_config import SparseConfig

_FORMAT = "partune adapter, version 1"
_CONFIGS: dict[str, type[AdapterConfig]] = {
    config.method: config for config in (ScaleShiftConfig, BlockLoRAConfig, SparseConfig)
}


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None
) -> None:
    """Write an adapter, the head that it trained, its config and the base's fingerprint.

    Args:
        path: of the file, by custom `….safetensors`; it appears whole or not at all.
        name: of the adapter; None: the active one.

    Raises:
        ValueError: a name that isn't attached, or none given and none active; a path that is a
            folder's.
        ImportError: safetensors isn't installed.

    Example:
        >>> import tempfile
        >>> from partune.nn import attach
        >>> folder, model = tempfile.TemporaryDirectory(), nn.Sequential(nn.Linear(4, 8))
        >>> save_adapter(attach(model, ScaleShiftConfig()), f"{folder.name}/ssf.safetensors")
    """
    name, adapter = attached(model, name)
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"path: got the folder {path}, want a file, such as {path / 'adapter.safetensors'}"
        )
    tensors = {}
    for layer_name, layer in adapter.holders.items():
        module = model.get_submodule(layer_name)
        trained = getattr(module, layer.children_name)[name]
        for key, value in layer.file_tensors(module, trained).items():
            tensors[f"{layer_name}.{key}"] = (
                value.detach().cpu().clone(memory_format=torch.contiguous_format)
            )
    metadata = {
        "format": _FORMAT,
        "method": adapter.config.method,
        "config": json.dumps(adapter.config.to_dict()),
        "fingerprint": json.dumps(fingerprint(model)),
    }
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _safetensors().torch.save_file(tensors, staging, metadata)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, name: str = "default"
) -> nn.Module:
    """Attach an adapter from a file of `save_adapter`, and activate it.

    Args:
        model: the base that it was trained on, whose tensors have to be the same bit for bit, but
            for those of a head that the file replaces.
        name: to attach it under.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of `save_adapter`; another base; tensors that don't fit the model; a
            name that is taken. Then the model is as it was.
        ImportError: safetensors isn't installed.

    Example:
        >>> import copy, tempfile
        >>> from partune.nn import attach
        >>> folder, base = tempfile.TemporaryDirectory(), nn.Sequential(nn.Linear(4, 8))
        >>> model = attach(copy.deepcopy(base), ScaleShiftConfig())
        >>> save_adapter(model, f"{folder.name}/ssf.safetensors")
        >>> loaded = load_adapter(base, f"{folder.name}/ssf.safetensors")
        >>> torch.equal(loaded(torch.ones(4)), model(torch.ones(4)))
        True
    """
    metadata, tensors = _read(Path(path))
    config, wanted = _described(metadata, path)
    plan = planned(model, config, name, from_file=True)
    base = fingerprint(model)
    _check_base(base, wanted, plan, path)
    fill(plan, tensors, path)
    add_adapter(model, config, name, plan, base)
    return model


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("adapters are kept as safetensors: pip install safetensors") from error
    return safetensors


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    safetensors = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} is no file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"path: {path} is no whole safetensors file ({error})") from None
    if metadata.get("format") != _FORMAT or metadata.get("method") not in _CONFIGS:
        raise ValueError(
            f"path: {path} holds {metadata.get('format', 'no adapter of partune')!r} with method "
            f"{metadata.get('method')!r}, want {_FORMAT!r} with {' or '.join(_CONFIGS)}"
        )
    return metadata, tensors


def _described(
    metadata: Mapping[str, str], path: str | os.PathLike[str]
) -> tuple[AdapterConfig, dict[str, str]]:
    """The config and the base's fingerprint that a file names."""
    try:
        config = _CONFIGS[metadata["method"]].from_dict(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: {path} is damaged: its config can't be read ({error})") from None
    try:
        return config, dict(json.loads(metadata["fingerprint"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"path: {path} is damaged: its fingerprint can't be read ({error})"
        ) from None


def _check_base(
    base: Mapping[str, str],
    wanted: Mapping[str, str],
    plan: Mapping[str, Placement],
    path: str | os.PathLike[str],
) -> None:
    """Every tensor is the one that was trained on, but for those that the file replaces."""
    heads = tuple(f"{name}." for name, placed in plan.items() if placed.layer is TrainedCopy)
    names = sorted(
        name
        for name in {*base, *wanted}
        if base.get(name) != wanted.get(name) and not name.startswith(heads)
    )
    if names:
        raise ValueError(
            f"model: {path} was trained on another base: {len(names)} tensors differ, the first is "
            f"{names[0]}; load the weights that it was trained on, in the same dtype"
        )


def fill(
    plan: Mapping[str, Placement], tensors: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Put the file's tensors into the plan, where they replace those of the start."""
    wanted: dict[str, Any] = {}
    for layer_name, placement in plan.items():
        if placement.adapter is not None:
            _make_room(layer_name, placement, tensors, path)
            for key, value in placement.adapter.state_dict(keep_vars=True).items():
                wanted[f"{layer_name}.{key}"] = value
    if wanted.keys() != tensors.keys():
        names = sorted(wanted.keys() ^ tensors.keys())
        raise ValueError(
            f"path: {path} doesn't fit the model: {names[0]} is in one alone, as are "
            f"{len(names) - 1} others"
        )
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"path: {path} has {name} of shape {tuple(value.shape)}, want "
                f"{tuple(wanted[name].shape)}"
            )
        if value.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(
                f"path: {path} has {name} of {value.dtype}, want one like {wanted[name].dtype}"
            )
    for name, value in tensors.items():
        wanted[name].data = value.to(wanted[name].device)


def _make_room(
    layer_name: str,
    placement: Placement,
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
) -> None:
    own = {key: value for key, value in tensors.items() if key.startswith(f"{layer_name}.")}
    own = {key.removeprefix(f"{layer_name}."): value for key, value in own.items()}
    assert placement.adapter is not None
    try:
        placement.layer.make_room(placement.adapter, own)
    except (TypeError, ValueError) as error:
        raise ValueError(f"path: {path} doesn't fit the model: {layer_name}, {error}") from None
