"""Layers that carry adapters: a module's class is swapped, its own parameters stay where they are.

Swapping the class keeps the module's identity, hooks and state_dict keys, and giving it back is
exact: a disabled adapter leaves the very module that was there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from partune.ops import frozen_linear


class Adapters(nn.ModuleDict):
    """What a layer's adapters added to it, by name."""


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A model's own modules with their names, each once, without what adapters added."""
    added: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, Adapters):
            added.update(module.modules())
        elif module not in added:
            yield name, module


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's own state_dict, without what adapters added."""
    added = tuple(f"{n}." for n, module in model.named_modules() if isinstance(module, Adapters))
    state = model.state_dict()
    return {name: value for name, value in state.items() if not name.startswith(added)}


class AdaptedLayer(nn.Module):
    """A layer with adapters, by name, in the child that `children_name` names.

    A subclass computes the layer with the adapter `self.adapter`. It either comes before the class
    that it replaces, or, where that class hands its input on with `super().forward`, behind it.
    """

    children_name: ClassVar[str] = ""  # empty: it computes without one
    original_class: ClassVar[type[nn.Module]]
    mixes: ClassVar[bool] = False  # whether rows of a batch may have adapters of their own
    subtracts: ClassVar[bool] = False  # whether a merged adapter can be taken out by subtraction
    replaces: ClassVar[bool] = False  # its own parameters by others, when merged
    active_adapter: str

    @property
    def adapter(self) -> nn.Module:
        """What the active adapter put here."""
        adapters: Adapters = getattr(self, self.children_name)
        return adapters[self.active_adapter]

    def merged(self) -> dict[str, Tensor]:
        """The parameters and buffers with which the plain layer computes the same, unrounded.

        Raises:
            ValueError: there are none; the message goes on from the layer's name.
        """
        raise NotImplementedError

    @classmethod
    def subtracted(cls, module: nn.Module, adapter: nn.Module) -> dict[str, Tensor]:
        """The parameters of a plain layer into which an adapter was merged, without it."""
        raise NotImplementedError

    @staticmethod
    def of_rows(adapter: nn.Module, input: Tensor, base: Tensor) -> Tensor:
        """The output of rows that have this adapter, given the plain layer's."""
        raise NotImplementedError

    def entered(self) -> None:
        """Take over: what follows when the layer has been activated."""

    def left(self) -> None:
        """Give over: what precedes when the layer is given its own class back."""

    def settle(self) -> None:
        """Let what is in the weight stay there when the layer is left, as it was merged."""

    @classmethod
    def file_tensors(cls, module: nn.Module, adapter: nn.Module) -> dict[str, Tensor]:
        """What a file keeps of a module's adapter."""
        tensors: dict[str, Tensor] = adapter.state_dict()
        return tensors

    @classmethod
    def make_room(cls, adapter: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Make an adapter of the sizes of a file's tensors, where its config leaves them open.

        Raises:
            TypeError, ValueError: tensors that can't be the adapter's.
        """

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the two classes that a made one is made of."""
        swapped = type(self)
        made_of = swapped.__dict__.get("made_of")
        if made_of is None:
            return super().__reduce_ex__(protocol)
        get_state = getattr(self, "__getstate__", None)
        state = get_state() if get_state is not None else self.__dict__.copy()
        return _blank, made_of, state


def _blank(original: type[nn.Module], layer: type[AdaptedLayer]) -> AdaptedLayer:
    swapped = swapped_class(original, layer)
    return swapped.__new__(swapped)


_made: dict[tuple[type[nn.Module], type[AdaptedLayer]], type[AdaptedLayer]] = {}


def swapped_class(original: type[nn.Module], layer: type[AdaptedLayer]) -> type[AdaptedLayer]:
    """The subclass of a module's class that computes it with an adapter; one for each pair."""
    if original is layer.__dict__.get("original_class"):
        return layer
    made_of = (original, layer)
    if made_of not in _made:
        bases = (original, layer) if hands_on(original, layer) else (layer, original)
        body = {"original_class": original, "made_of": made_of, "__module__": __name__}
        _made[made_of] = type(f"{layer.__name__}_{original.__name__}", bases, body)
    return _made[made_of]


def hands_on(original: type[nn.Module], layer: type[AdaptedLayer]) -> bool:
    """Whether a class's forward ends in `super().forward`, which the layer then computes."""
    exact = layer.__dict__.get("original_class")
    if exact is None or not issubclass(original, exact) or original.forward is exact.forward:
        return False
    code = getattr(original.forward, "__code__", None)
    return code is not None and "__class__" in code.co_freevars and "forward" in code.co_names


def give_adapter(
    module: nn.Module, layer: type[AdaptedLayer], name: str, adapter: nn.Module
) -> None:
    """Keep an adapter in the module, which computes as before until the adapter is activated."""
    if not hasattr(module, layer.children_name):
        module.add_module(layer.children_name, Adapters())
    getattr(module, layer.children_name)[name] = adapter


def take_adapter(module: nn.Module, layer: type[AdaptedLayer], name: str) -> None:
    """Drop an adapter that isn't active."""
    adapters: Adapters = getattr(module, layer.children_name)
    del adapters[name]
    if not adapters:
        delattr(module, layer.children_name)


def activate(module: nn.Module, layer: type[AdaptedLayer], name: str) -> None:
    module.active_adapter = name  # type: ignore[assignment]
    module.__class__ = swapped_class(type(module), layer)
    assert isinstance(module, AdaptedLayer)
    module.entered()


def deactivate(module: nn.Module) -> None:
    """Give the module its own class back."""
    assert isinstance(module, AdaptedLayer)
    module.left()
    module.__dict__.pop("active_adapter", None)
    module.__class__ = module.original_class  # type: ignore[assignment]


@torch.no_grad()
def write(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a plain layer merged parameters and buffers, rounded to its own dtype."""
    like = next(module.parameters(recurse=False), None)
    for name, value in values.items():
        own = getattr(module, name)
        if own is not None:
            own.copy_(value)
            continue
        value = value.clone() if like is None else value.to(like.device, like.dtype, copy=True)
        requires_grad = like is None or like.requires_grad
        module.register_parameter(name, nn.Parameter(value, requires_grad))
        if name == "weight":  # of a norm that had none
            module.elementwise_affine = module.affine = True  # type: ignore[assignment]


def restore(module: nn.Module, values: Mapping[str, Tensor | None]) -> None:
    """Give a layer back what `write` overwrote; None for what it created."""
    for name, value in values.items():
        if value is None:
            module.register_parameter(name, None)
            if name == "weight":
                module.elementwise_affine = module.affine = False  # type: ignore[assignment]
        else:
            getattr(module, name).data.copy_(value)


@torch.no_grad()
def computes_with(layer: AdaptedLayer, merged: Mapping[str, Tensor], input: Tensor) -> bool:
    """Whether the plain layer with these parameters computes the same: tried on an input."""
    trial = copy.deepcopy(layer).double().eval()
    wanted = trial(input.double())
    deactivate(trial)
    delattr(trial, layer.children_name)
    write(trial, merged)
    tolerance = 1e-5 * float(wanted.abs().amax())
    return bool(((trial(input.double()) - wanted).abs() <= tolerance).all())


class FrozenLinear(AdaptedLayer, nn.Linear):
    """A frozen linear layer without an adapter, such as a language model's head."""

    original_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return frozen_linear(input, self.weight, self.bias)

    def merged(self) -> dict[str, Tensor]:
        return {}


class TrainedCopy(AdaptedLayer):
    """A layer of the head: a copy of it is trained and used, the original stays as it was."""

    children_name = "trained"
    mixes = True
    replaces = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.adapter(*args, **kwargs)

    @staticmethod
    def of_rows(adapter: nn.Module, input: Tensor, base: Tensor) -> Tensor:
        output: Tensor = adapter(input)
        return output

    def merged(self) -> dict[str, Tensor]:
        return {key: value.detach() for key, value in self.adapter.state_dict().items()}

    @staticmethod
    def of(module: nn.Module) -> nn.Module:
        """A copy of a layer as it was before any adapter."""
        children = module._modules.get(TrainedCopy.children_name)
        memo = {} if children is None else {id(children): children}
        original = copy.deepcopy(module, memo)
        original._modules.pop(TrainedCopy.children_name, None)
        return original.requires_grad_(True)
