"""The one registry of a model's adapters: attach, detach, set_adapter, disable_adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from partune.nn._fingerprint import fingerprint_tensors
from partune.nn._layers import (
    AdaptedLayer,
    FrozenLinear,
    activate,
    base_modules,
    deactivate,
    give_adapter,
    take_adapter,
)

_ATTRIBUTE = "_partune_adapters"


@dataclass(frozen=True)
class Placement:
    """What becomes of one module: its class, and what it computes with.

    Without an adapter it is computed by another, whose name is `within`.
    """

    layer: type[AdaptedLayer]
    adapter: nn.Module | None = None
    within: str | None = None


class AdapterConfig:
    """A method's options. `method` names it in files, `plan` says what becomes of which module."""

    method: ClassVar[str]

    def plan(self, model: nn.Module) -> Mapping[str, Placement]:
        raise NotImplementedError

    def plan_to_fill(self, model: nn.Module) -> Mapping[str, Placement]:
        """The plan for an adapter whose tensors will come from a file."""
        return self.plan(model)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON holds them, so that `from_dict` gives the same plan."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> AdapterConfig:
        raise NotImplementedError


@dataclass
class Adapter:
    """An attached config, and which modules it swaps for what."""

    config: AdapterConfig
    layers: dict[str, type[AdaptedLayer]]

    @property
    def holders(self) -> dict[str, type[AdaptedLayer]]:
        """Those of the layers that hold something of it; the others only compute otherwise."""
        return {name: layer for name, layer in self.layers.items() if layer.children_name}


@dataclass
class Registry:
    """By names alone, so that copies and pickles of the model keep a registry of their own."""

    fingerprint: dict[str, str]
    required_grad: dict[str, bool]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    lock: str | None = None  # why the adapters can't be changed now
    merged: Any = None  # what `unmerge` needs


def registry_of(model: nn.Module) -> Registry | None:
    registry: Registry | None = model.__dict__.get(_ATTRIBUTE)
    return registry


def unlocked(model: nn.Module) -> Registry | None:
    """The registry of a model whose adapters may be changed."""
    registry = registry_of(model)
    if registry is not None and registry.lock is not None:
        raise ValueError(f"model: {registry.lock}")
    return registry


@contextmanager
def locked(model: nn.Module, why: str) -> Iterator[None]:
    registry = registry_of(model)
    assert registry is not None
    registry.lock = why
    try:
        yield
    finally:
        registry.lock = None


def attached(model: nn.Module, name: str | None, argument: str = "name") -> tuple[str, Adapter]:
    """An adapter by its name, or the active one."""
    registry = unlocked(model)
    if registry is None:
        raise ValueError(f"model: got a {type(model).__name__} without adapters; attach one first")
    if name is None and registry.active is None:
        raise ValueError(
            f"{argument}: no adapter is active, want one of {sorted(registry.adapters)}"
        )
    name = registry.active if name is None else name
    if name not in registry.adapters:
        raise ValueError(f"{argument}: got {name!r}, want one of {sorted(registry.adapters)}")
    assert name is not None
    return name, registry.adapters[name]


def attach(model: nn.Module, config: AdapterConfig, *, name: str = "default") -> nn.Module:
    """Add an adapter to a model, in place, and activate it: its parameters train, no others do.

    The layers that the config chooses get subclasses of their own classes and keep their names and
    parameters, so the base's state_dict keys stay as they are. Linear layers that it leaves alone
    become `FrozenLinear`, whose product is that of `partune.ops.frozen_linear`. What is added has
    keys of its own, `<layer>.scale_shift.<name>.scale`, `<layer>.block_lora.<name>.down`,
    `<layer>.sparse.<name>.values`.

    Args:
        model: any module; its weights have to be loaded, for the fingerprint of the base is taken.
        config: a `ScaleShiftConfig`, a `BlockLoRAConfig` or a `SparseConfig`.
        name: under which `set_adapter`, `detach`, `merge` and `save_adapter` find it.

    Returns:
        The same model.

    Raises:
        ValueError: a name that is taken or no identifier; a target or head that the model doesn't
            have; a layer whose channels could be in two places.
        TypeError: a target that is no layer for the method.

    Example:
        >>> from torch import nn
        >>> from partune.nn import ScaleShiftConfig
        >>> model = attach(nn.Sequential(nn.Linear(4, 8), nn.GELU()), ScaleShiftConfig())
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.scale_shift.default.scale', '0.scale_shift.default.shift']
    """
    plan = planned(model, config, name)
    add_adapter(model, config, name, plan, fingerprint(model))
    return model


def planned(
    model: nn.Module, config: AdapterConfig, name: str, *, from_file: bool = False
) -> Mapping[str, Placement]:
    """The config's plan for the model, which stays untouched; errors say what can't be."""
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"config: got {type(config).__name__}, want one like BlockLoRAConfig()")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name: got {name!r}, want an identifier, such as 'default'")
    registry = unlocked(model)
    if registry is not None and name in registry.adapters:
        raise ValueError(f"name: {name!r} is attached already; detach it or choose another name")
    ours = set() if registry is None else {n for a in registry.adapters.values() for n in a.layers}
    for layer_name, module in model.named_modules():
        if isinstance(module, AdaptedLayer) and layer_name not in ours:
            raise ValueError(
                f"model: {layer_name} has an adapter that was attached to another module than this "
                f"{type(model).__name__}; attach all adapters to the same one"
            )
    active = None if registry is None else registry.active
    try:
        if registry is not None:
            _deactivate(model, registry)  # the plan is made on the base's own classes
        plan = config.plan_to_fill(model) if from_file else config.plan(model)
        return {**_frozen_linears(model, plan), **plan}
    finally:
        if active is not None:
            set_adapter(model, active)


def _frozen_linears(model: nn.Module, plan: Mapping[str, Placement]) -> dict[str, Placement]:
    """The linear layers that the plan leaves as they are, and that no layer of it computes."""
    within = tuple(f"{name}." for name in plan)
    return {
        name: Placement(FrozenLinear)
        for name, module in base_modules(model)
        if type(module) is nn.Linear and name not in plan and not name.startswith(within)
    }


def add_adapter(
    model: nn.Module,
    config: AdapterConfig,
    name: str,
    plan: Mapping[str, Placement],
    base: dict[str, str],
) -> None:
    """Put a plan into the model and activate it; nothing here can fail halfway."""
    registry = registry_of(model)
    if registry is None:
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        registry = model.__dict__[_ATTRIBUTE] = Registry(base, flags)
        model.requires_grad_(False)
    for layer_name, placement in plan.items():
        if placement.adapter is not None:
            module = model.get_submodule(layer_name)
            placement.adapter.train(module.training)
            give_adapter(module, placement.layer, name, placement.adapter)
    layers = {layer_name: placement.layer for layer_name, placement in plan.items()}
    registry.adapters[name] = Adapter(config, layers)
    set_adapter(model, name)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Activate one of a model's adapters, or none: then the outputs are the base's, bit for bit.

    The active adapter's parameters train, the others' don't.

    Raises:
        ValueError: a name that isn't attached.

    Example:
        >>> from torch import nn
        >>> from partune.nn import ScaleShiftConfig, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 8)), ScaleShiftConfig(), name="cars")
        >>> set_adapter(model, None)
        >>> type(model[0]).__name__
        'Linear'
    """
    registry = unlocked(model)
    if name is not None or registry is None:
        attached(model, name or "")
    assert registry is not None
    _deactivate(model, registry)
    if name is not None:
        for layer_name, layer in registry.adapters[name].layers.items():
            module = model.get_submodule(layer_name)
            activate(module, layer, name)
            if isinstance(module, AdaptedLayer) and layer.children_name:
                module.adapter.requires_grad_(True)
    registry.active = name


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Compute with the base alone, and with the active adapter again afterwards.

    Raises:
        ValueError: a model without adapters.

    Example:
        >>> from torch import nn
        >>> from partune.nn import ScaleShiftConfig, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 8)), ScaleShiftConfig())
        >>> with disable_adapter(model):
        ...     type(model[0]).__name__
        'Linear'
    """
    registry = unlocked(model)
    active = None if registry is None else registry.active
    set_adapter(model, None)
    try:
        yield
    finally:
        set_adapter(model, active)


def _deactivate(model: nn.Module, registry: Registry) -> None:
    if registry.active is not None:
        for layer_name, layer in registry.adapters[registry.active].layers.items():
            module = model.get_submodule(layer_name)
            if isinstance(module, AdaptedLayer) and layer.children_name:
                module.adapter.requires_grad_(False)
            deactivate(module)
    registry.active = None


def lock_merged(model: nn.Module, registry: Registry, merged: Any) -> None:
    """Keep, of a registry without adapters, what tells the base and undoes a merge."""
    why = "an adapter is merged into its weights; call unmerge(model) first"
    model.__dict__[_ATTRIBUTE] = Registry(
        registry.fingerprint, registry.required_grad, lock=why, merged=merged
    )


def forget_merged(model: nn.Module) -> None:
    del model.__dict__[_ATTRIBUTE]


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Remove an adapter, or all; without any, the model is what it was before `attach`.

    Weights, buffers, classes, state_dict keys and requires_grad are the base's, bit for bit.

    Args:
        name: of one adapter; None: all of them.

    Returns:
        The same model.

    Raises:
        ValueError: a name that isn't attached, or a model without adapters.

    Example:
        >>> from torch import nn
        >>> from partune.nn import ScaleShiftConfig, attach
        >>> detach(attach(nn.Sequential(nn.Linear(4, 8)), ScaleShiftConfig()))
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
        )
    """
    registry = unlocked(model)
    if name is not None or registry is None:
        attached(model, name or "")
    assert registry is not None
    active = registry.active
    _deactivate(model, registry)
    for removed in [name] if name is not None else list(registry.adapters):
        for layer_name, layer in registry.adapters.pop(removed).layers.items():
            if layer.children_name:
                take_adapter(model.get_submodule(layer_name), layer, removed)
    if not registry.adapters:
        del model.__dict__[_ATTRIBUTE]
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(registry.required_grad.get(parameter_name, True))
    elif active in registry.adapters:
        set_adapter(model, active)
    return model


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Tell a base by its tensors: SHA-256 over name, shape, dtype and bytes of each.

    A model with adapters gives what was taken when the first was attached.

    Raises:
        ValueError: a tensor without values (on the meta device).

    Example:
        >>> from torch import nn
        >>> sorted(fingerprint(nn.Linear(4, 8)))
        ['bias', 'weight']
    """
    registry = registry_of(model)
    if registry is not None:
        return dict(registry.fingerprint)
    return fingerprint_tensors(model.state_dict())


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the parameters that train, and all; peft's `get_nb_trainable_parameters`.

    Example:
        >>> from torch import nn
        >>> from partune.nn import ScaleShiftConfig, attach
        >>> trainable_parameters(attach(nn.Sequential(nn.Linear(4, 8)), ScaleShiftConfig()))
        (16, 56)
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters())


def print_trainable_parameters(model: nn.Module) -> None:
    """Print both counts of `trainable_parameters`, and their ratio, as peft does.

    Example:
        >>> from torch import nn
        >>> from partune.nn import ScaleShiftConfig, attach
        >>> print_trainable_parameters(attach(nn.Sequential(nn.Linear(4, 8)), ScaleShiftConfig()))
        trainable params: 16 || all params: 56 || trainable%: 28.5714
    """
    trained, total = trainable_parameters(model)
    share = 100 * trained / max(total, 1)
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}")
