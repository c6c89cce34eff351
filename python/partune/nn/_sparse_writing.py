"""Layers whose weights hold trained values, which are written after every optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from partune.nn._layers import AdaptedLayer
from partune.nn._sparse_entries import SparseEntries, write_all_
from partune.nn._sparse_groups import KEY, regroup

Parts = Mapping[str, tuple[SparseEntries, Tensor]]

_layers: Any = WeakTensorKeyDictionary()  # by values: the layers whose weights hold them
_hook: RemovableHandle | None = None
WATCHED = "watched_values"  # in a layer's `__dict__`, not among its parameters: by their ids
_OWN_ALONE = (KEY, WATCHED)  # of a layer's attributes, what copies don't take over


class WrittenLayer(AdaptedLayer):
    """A layer whose frozen weights hold the values of its active adapter."""

    children_name = "sparse"
    subtracts = True

    @classmethod
    def weights_of(cls, module: nn.Module) -> dict[str, Tensor]:
        """The weights of which entries train, by the prefix of these entries' keys."""
        raise NotImplementedError

    @classmethod
    def adapter_of(cls, entries: Mapping[str, SparseEntries]) -> nn.Module:
        """The adapter that has such entries, by the same prefixes."""
        raise NotImplementedError

    @classmethod
    def parts_of(cls, module: nn.Module, adapter: nn.Module) -> Parts:
        """The entries of an adapter and the weights that they belong to, by the same prefixes."""
        raise NotImplementedError

    @property
    def parts(self) -> Parts:
        return self.parts_of(self, self.adapter)

    def entered(self) -> None:
        for entries, weight in self.parts.values():
            entries.put_in_(weight)
        watch(self)

    def left(self) -> None:
        unwatch(self)
        for entries, weight in self.parts.values():
            if not entries.stays:
                entries.take_out_(weight)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _OWN_ALONE}

    def __setstate__(self, state: Any) -> None:
        """Copies and pickles have values of their own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        watch(self)

    def refuse_stale(self, entries: SparseEntries, values: Tensor, weight: Tensor) -> None:
        """Refuse to compute with values that the weight doesn't hold."""
        if id(values) not in self.__dict__.get(WATCHED, ()):
            raise RuntimeError(
                "values: got a parameter that replaced the layer's own (as FSDP or functional_call "
                "do), so the optimizer's steps don't reach the weight; train it unsharded, for "
                "example under DistributedDataParallel"
            )
        if values._version != entries.written_version and not entries.is_written(weight):
            raise RuntimeError(
                "values: they have changed since they were written into the weight; call "
                "partune.nn.write_back_(model) after whatever changed them but an optimizer's step"
            )

    def merged(self) -> dict[str, Tensor]:
        return {}  # the weights hold them

    def settle(self) -> None:
        write_all_(self.parts.values())
        for entries, _ in self.parts.values():
            entries.stays = True

    @classmethod
    def subtracted(cls, module: nn.Module, adapter: nn.Module) -> dict[str, Tensor]:
        return {}  # activating leaves them, and deactivating exchanges them again

    @classmethod
    def file_tensors(cls, module: nn.Module, adapter: nn.Module) -> dict[str, Tensor]:
        return {
            prefix + name: tensor
            for prefix, (entries, weight) in cls.parts_of(module, adapter).items()
            for name, tensor in entries.file_tensors(weight).items()
        }

    @classmethod
    def make_room(cls, adapter: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        for name, entries in adapter.named_modules():
            if isinstance(entries, SparseEntries):
                prefix = f"{name}." if name else ""
                own = {key: value for key, value in tensors.items() if key.startswith(prefix)}
                entries.make_room({key.removeprefix(prefix): own[key] for key in own})


def watch(layer: WrittenLayer) -> None:
    """Write the layer's values into its weights after every step of what optimizer has them."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)
    watched = layer.__dict__[WATCHED] = {}
    for entries, _ in layer.parts.values():
        values = entries.values
        if values not in _layers:
            _layers[values] = weakref.WeakSet()
        _layers[values].add(layer)
        watched[id(values)] = values


def unwatch(layer: WrittenLayer) -> None:
    for values in layer.__dict__.pop(WATCHED, {}).values():
        watching = _layers.get(values)
        if watching is not None:
            watching.discard(layer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if len(_layers) == 0:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    layers = {layer: None for parameter in parameters for layer in _layers.get(parameter, ())}
    parts = [part for layer in layers for part in layer.parts.values()]
    write_all_({(entries, id(weight)): (entries, weight) for entries, weight in parts}.values())
    regroup(layers)


def write_back_(model: nn.Module) -> None:
    """Write the trained values of a model's sparse layers into their weights.

    Optimizers of torch's class do it by themselves after each step. This is for whoever changes
    values in another way: by hand, by an optimizer of another class, by loading them alone.

    Raises:
        ValueError: no sparse layer is active in the model.

    Example:
        >>> import torch
        >>> from partune.nn import SparseConfig, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 8)), SparseConfig(density=0.25))
        >>> with torch.no_grad():
        ...     _ = model[0].adapter.values.zero_()
        >>> write_back_(model)
        >>> int((model[0].weight == 0).sum())
        8
    """
    write_all_(written_weights(model).items())


def written_weights(model: nn.Module) -> dict[SparseEntries, Tensor]:
    """The weights that hold the values of active entries, once each."""
    found: dict[SparseEntries, Tensor] = {}
    for module in model.modules():
        if isinstance(module, WrittenLayer):
            for entries, weight in module.parts.values():
                found.setdefault(entries, weight)
    if not found:
        raise ValueError(
            f"model: got a {type(model).__name__} without active sparse layers; "
            "attach(model, SparseConfig()) makes them, set_adapter activates them"
        )
    return found
