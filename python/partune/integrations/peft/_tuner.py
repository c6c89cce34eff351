"""What peft puts into a model: a layer around each that has adapters, and a tuner around all.

The layer keeps the adapters and steps aside: the module inside it gets the class that computes with
the active adapter, as `partune.nn.attach` gives it, or its own class back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from partune.integrations.peft._configs import HEADS_BY_TASK, AdapterPeftConfig
from partune.nn._layers import (
    AdaptedLayer,
    Adapters,
    TrainedCopy,
    activate,
    deactivate,
    restore,
    write,
)
from partune.nn._merge import expressed, refuse_shared
from partune.nn._registry import Placement
from partune.nn._targets import ends_in


class TunerLayer(nn.Module, BaseTunerLayer):
    """A module with adapters by name, and the state that peft asks for."""

    children_name: ClassVar[str]
    sums_up: ClassVar[bool] = False  # so that several adapters can be merged

    base_layer: nn.Module
    active_adapters: list[str]
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        adapters = Adapters()
        self.add_module(self.children_name, adapters)
        # the module inside finds them too, but they are registered here alone
        base_layer.__dict__[self.children_name] = adapters
        self.layers: dict[str, type[AdaptedLayer]] = {}
        self._activations: dict[str, tuple[nn.Module, type[AdaptedLayer]]] = {}
        self._originals: dict[str, Tensor | None] = {}
        self._active_adapter: list[str] = []
        self.merged_adapters = []

    @property
    def adapters(self) -> Adapters:
        adapters: Adapters = getattr(self, self.children_name)
        return adapters

    def add(self, name: str, placement: Placement) -> None:
        """Keep an adapter, which computes once peft activates it."""
        assert placement.adapter is not None
        self.adapters[name] = placement.adapter.train(self.training)
        self.layers[name] = placement.layer

    def fuse(self, name: str, module: nn.Module, layer: type[AdaptedLayer]) -> None:
        """Let a module after this one pass its input on while an adapter computes it too."""
        self._activations[name] = (module, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def rest(self) -> None:
        """Give the module inside, and one that is computed within, their own classes back."""
        for module in (self.base_layer, *(module for module, _ in self._activations.values())):
            if isinstance(module, AdaptedLayer):
                deactivate(module)

    def follow(self) -> None:
        """Let the adapter compute that is active, if any."""
        self.rest()
        if self.disable_adapters or self.merged:
            return
        for name in self.active_adapters:
            if name in self.layers:
                activate(self.base_layer, self.layers[name], name)
            if name in self._activations:
                activate(*self._activations[name], name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.follow()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)
        self.follow()

    def delete_adapter(self, adapter_name: str) -> None:
        self.rest()
        self.layers.pop(adapter_name, None)
        self._activations.pop(adapter_name, None)
        super().delete_adapter(adapter_name)
        self.follow()

    def names_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in names if name in self.layers and name not in self.merged_adapters]

    def merged_values(self, name: str) -> dict[str, Tensor]:
        """What the plain module has to hold to compute the same as with an adapter."""
        self.rest()
        try:
            del self.base_layer.__dict__[self.children_name]
            self.base_layer.add_module(self.children_name, self.adapters)
            activate(self.base_layer, self.layers[name], name)
            assert isinstance(self.base_layer, AdaptedLayer)
            return self.base_layer.merged()
        finally:
            delattr(self.base_layer, self.children_name)
            self.base_layer.__dict__[self.children_name] = self.adapters
            self.follow()

    @property
    def created(self) -> list[str]:
        """Parameters that merging has created."""
        return [key for key, value in self._originals.items() if value is None]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the active adapter, or those named, into the module; the original is kept."""
        for name in self.names_to_merge(adapter_names):
            values = self.merged_values(name)
            self.rest()
            for key in values.keys() - self._originals.keys():
                own = getattr(self.base_layer, key)
                self._originals[key] = None if own is None else own.detach().clone()
            write(self.base_layer, values)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Give the module its values back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        restore(self.base_layer, self._originals)
        self._originals = {}
        self.merged_adapters = []
        self.follow()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module as it was, or with adapters merged into it."""
        if merge:
            self.merge(safe_merge, adapter_names)
        elif self.merged:
            self.unmerge()
        self.rest()
        del self.base_layer.__dict__[self.children_name]
        return self.base_layer

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """The device alone: beside 16-bit weights adapters stay float32."""
        if device is None:
            device = next((p.device for p in self.base_layer.parameters(recurse=False)), None)
        if adapter_name in self.adapters and device is not None:
            self.adapters[adapter_name].to(device)


class TunerModel(BaseTuner):
    """A model with one of partune's methods in it."""

    tuner_layer_cls: type[TunerLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    _plan: Mapping[str, Placement]

    def _prepare_adapter_config(
        self, peft_config: AdapterPeftConfig, model_config: dict[str, Any]
    ) -> AdapterPeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: AdapterPeftConfig, model: nn.Module) -> None:
        """Decide what becomes of which module; what was left open is written into the config."""
        if isinstance(peft_config.target_modules, str):
            all_linear = peft_config.target_modules.lower() == "all-linear"
            peft_config.target_modules = None if all_linear else peft_config.target_modules
        with self.plain(model):
            _refuse_attached(model)
            peft_config.modules_to_save = _heads(peft_config, model)
            plan = peft_config.adapter_config().plan(model)
            heads = [name for name, placed in plan.items() if placed.layer is TrainedCopy]
            refuse_more_than(heads, [name for name, _ in model.named_modules()])
        self._plan = {name: placed for name, placed in plan.items() if name not in heads}
        peft_config.modules_to_save = heads
        if peft_config.target_modules is None:
            peft_config.target_modules = [
                name for name, placed in self._plan.items() if placed.adapter is not None
            ]

    def _check_target_module_exists(self, peft_config: AdapterPeftConfig, key: str) -> bool:
        placement = self._plan.get(key)
        return placement is not None and placement.adapter is not None

    def _create_and_replace(
        self,
        peft_config: AdapterPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, TunerLayer):
            layer = self.tuner_layer_cls(target).train(target.training)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.add(adapter_name, self._plan[current_key])
        for name, placement in self._plan.items():
            if placement.within == current_key:
                module = self.model.get_submodule(name)
                target.fuse(adapter_name, module, placement.layer)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        setattr(parent, child_name, new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if len(names) > 1:
            raise ValueError(f"adapter_name: got {names}, want one: {self._one_at_a_time}")
        super().set_adapter(adapter_name, inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **options: Any) -> Iterator[None]:
        """Where peft hands on what it doesn't give to the model."""
        if options.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names: {self._one_at_a_time}; for rows with adapters of their own, "
                "attach them by partune.nn.attach and use partune.nn.mixed_adapters"
            )
        yield

    @property
    def _one_at_a_time(self) -> str:
        return f"a {type(self).__name__} computes with one adapter at a time"

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        self._check_merging(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        flags: Sequence[str] = ()
        zeros: Sequence[str] = ()
        if merge:
            created = self._check_merging(adapter_names, safe_merge)
            with self.plain(self.model):
                flags, zeros = expressed(self.model, created) if created else ((), ())
        model: nn.Module = super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge, adapter_names
        )
        for bias in zeros:
            layer_name = bias.removesuffix(".bias")
            size = len(model.get_parameter(f"{layer_name}.weight"))
            write(model.get_submodule(layer_name), {"bias": torch.zeros(size)})
        for flag in flags:
            setattr(model.config, flag, True)
        return model

    def _check_merging(self, adapter_names: list[str] | None, safe_merge: bool) -> list[str]:
        """Refuse what can't be merged while nothing is changed; name what will be created."""
        unknown = sorted(set(adapter_names or ()) - set(self.peft_config))
        if unknown or isinstance(adapter_names, str):
            raise ValueError(
                f"adapter_names: got {adapter_names!r}, want a list of some of "
                f"{sorted(self.peft_config)}"
            )
        layers = [(n, m) for n, m in self.model.named_modules() if isinstance(m, TunerLayer)]
        created, changed = [], []
        for layer_name, layer in layers:
            names = layer.names_to_merge(adapter_names)
            if len(names) + len(layer.merged_adapters) > 1 and not layer.sums_up:
                both = [*layer.merged_adapters, *names]
                raise ValueError(f"adapter_names: got {both}, want one: {self._one_at_a_time}")
            for name in names:
                try:
                    values = layer.merged_values(name)
                except ValueError as error:
                    raise ValueError(f"{layer_name}: {error}") from None
                if safe_merge and not all(bool(v.isfinite().all()) for v in values.values()):
                    raise ValueError(
                        f"{layer_name}: merging {name!r} gives NaN or infinity; see what it was "
                        "trained with, or merge without safe_merge"
                    )
                changed.append(layer_name)
                missing = [key for key in values if getattr(layer.base_layer, key) is None]
                created += [f"{layer_name}.{key}" for key in missing]
            created += [f"{layer_name}.{key}" for key in layer.created]
        with self.plain(self.model):
            refuse_shared(self.model, changed)
        return created

    @contextmanager
    def plain(self, model: nn.Module) -> Iterator[None]:
        """The model as it was before peft, for as long as the context lasts."""
        wrapped = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, TunerLayer | ModulesToSaveWrapper)
        ]
        try:
            for name, module in wrapped:
                if isinstance(module, TunerLayer):
                    module.rest()
                    _put(model, name, module.base_layer)
                else:
                    _put(model, name, module.original_module)
            yield
        finally:
            for name, module in wrapped:
                _put(model, name, module)
                if isinstance(module, TunerLayer):
                    module.follow()


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._modules[leaf] = module


def _heads(peft_config: AdapterPeftConfig, model: nn.Module) -> list[str] | None:
    """The heads that the config names, and of those that peft adds the ones that there are."""
    by_task = HEADS_BY_TASK.get(peft_config.task_type or "", ())
    there = [
        head for head in by_task if any(ends_in(name, head) for name, _ in model.named_modules())
    ]
    named = [name for name in peft_config.modules_to_save or () if name not in by_task]
    if peft_config.modules_to_save is None and not there:
        return None
    return list(dict.fromkeys([*named, *there]))


def _refuse_attached(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer | Adapters):
            raise ValueError(
                f"model: {name} has an adapter that partune.nn.attach put there; detach it first"
            )


def refuse_more_than(heads: Sequence[str], names: Sequence[str]) -> None:
    """peft trains every module whose name ends in the letters of a head's, dots or not."""
    for name in names:
        for head in heads:
            if name.endswith(head) and not ends_in(name, head):
                raise ValueError(
                    f"modules_to_save: peft would take {name} for {head} and train it whole too; "
                    "train this model with partune.nn.attach, or with modules_to_save=[]"
                )


class ScaleShiftTunerLayer(TunerLayer):
    children_name = "scale_shift"
    adapter_layer_names = (children_name,)


class ScaleShiftModel(TunerModel):
    prefix = ScaleShiftTunerLayer.children_name
    tuner_layer_cls = ScaleShiftTunerLayer


class BlockLoRATunerLayer(TunerLayer):
    children_name = "block_lora"
    adapter_layer_names = (children_name,)
    sums_up = True


class BlockLoRAModel(TunerModel):
    prefix = BlockLoRATunerLayer.children_name
    tuner_layer_cls = BlockLoRATunerLayer
