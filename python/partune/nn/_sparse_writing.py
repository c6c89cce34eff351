"""Writing trained values into their weights: after every optimizer step, and on demand."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from partune.nn._layers import AdaptedLayer
from partune.nn._sparse_entries import SparseEntries, write_all_
from partune.nn._sparse_groups import regroup


class WrittenLayer(AdaptedLayer):
    """A layer whose weight holds the values of its active adapter."""

    weight: Any
    adapter: SparseEntries

    def write_back_(self) -> None:
        self.adapter.write_(self.weight)


_layers: Any = WeakTensorKeyDictionary()  # by values: the layers whose weights hold them
_hook: RemovableHandle | None = None
WATCHED = "watched_values"  # in a layer's `__dict__`, not among its parameters


def watch(layer: WrittenLayer) -> None:
    """Write the layer's values into its weight after every step of whatever optimizer has them."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)
    values = layer.adapter.values
    if values not in _layers:
        _layers[values] = weakref.WeakSet()
    _layers[values].add(layer)
    layer.__dict__[WATCHED] = values


def unwatch(layer: WrittenLayer) -> None:
    watching = _layers.get(layer.adapter.values)
    if watching is not None:
        watching.discard(layer)
    layer.__dict__.pop(WATCHED, None)


def is_watched(layer: WrittenLayer, values: Tensor) -> bool:
    """Whether optimizers that step these values will write them into the layer's weight."""
    return layer.__dict__.get(WATCHED) is values


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if len(_layers) == 0:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    layers = [layer for parameter in parameters for layer in _layers.get(parameter, ())]
    weights = {(layer.adapter, id(layer.weight)): layer.weight for layer in layers}  # each once
    write_all_((entries, weight) for (entries, _), weight in weights.items())
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
    write_all_((entries, layer.weight) for entries, layer in written_layers(model).items())


def written_layers(model: nn.Module) -> dict[SparseEntries, WrittenLayer]:
    """The active sparse layers by their entries, which tied weights share."""
    found: dict[SparseEntries, WrittenLayer] = {}
    for module in model.modules():
        if isinstance(module, WrittenLayer):
            found.setdefault(module.adapter, module)
    if not found:
        raise ValueError(
            f"model: got a {type(model).__name__} without active sparse layers; "
            "attach(model, SparseConfig()) makes them, set_adapter activates them"
        )
    return found
