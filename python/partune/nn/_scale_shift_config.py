"""ScaleShiftConfig: what `attach` takes for SSF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import nn

from partune.nn._fusion import activations_after
from partune.nn._layers import TrainedCopy
from partune.nn._registry import AdapterConfig, Placement
from partune.nn._scale_shift_layers import FusedActivation, ScaleShiftLayer
from partune.nn._scale_shift_sites import (
    RULES,
    channel_dim_of,
    is_decoder,
    layer_for,
)
from partune.nn._targets import check_names, head_names, target_names, trained_layers
from partune.nn.scale_shift import INIT_STD, ScaleShift


@dataclass(frozen=True)
class ScaleShiftConfig(AdapterConfig):
    """SSF for a whole model: a scale and a shift after its linear layers, convolutions and norms.

    The default sites are the paper's in transformers' ViT, DeiT, Swin, ConvNeXt, AST, CLIP and
    Dinov2 and in timm's models of these kinds, and every linear layer, convolution and norm of any
    other, but the head, projections out of the model and poolers. Norms, biases and a GELU that
    directly follows are computed in one pass with the scale and shift.

    Args:
        target_modules: names of modules, each matched as a suffix ("attention.o_proj"), or one
            regular expression that has to match a whole name. None: the default sites.
        shift: True or False for all sites. None: where the layer has a bias that can take the shift
            at `merge`, and nowhere in a decoder.
        modules_to_save: suffixes of the modules that are trained whole, () for none. None: the head
            by its usual names (classifier, head, fc, score), where there is one. Each adapter
            trains a copy of its own.
        channel_dim: -1 or 1, for layers whose class doesn't tell where the channels of its output
            are; for others the class decides.
        init_std: of the start, scale from N(1, init_std²) and shift from N(0, init_std²).

    Raises:
        ValueError: a `channel_dim` that is neither, or an `init_std` below 0.

    Reference: Scaling & Shifting Your Features (arXiv 2210.08823), section 3.2.

    Example:
        >>> from partune.nn import attach, trainable_parameters
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> trainable_parameters(attach(model, ScaleShiftConfig(target_modules=["1"])))
        (16, 72)
    """

    method: ClassVar[str] = "scale_shift"

    target_modules: str | Sequence[str] | None = None
    shift: bool | None = None
    modules_to_save: Sequence[str] | None = None
    channel_dim: int | None = None
    init_std: float = INIT_STD

    def __post_init__(self) -> None:
        if self.channel_dim not in (None, -1, 1):
            raise ValueError(f"channel_dim: got {self.channel_dim!r}, want None, -1 or 1")
        if not self.init_std >= 0.0:
            raise ValueError(f"init_std: got {self.init_std}, want at least 0")
        check_names("modules_to_save", self.modules_to_save)

    def plan(self, model: nn.Module) -> Mapping[str, Placement]:
        """Say what becomes of which module; the model stays as it is."""
        heads = head_names(model, self.modules_to_save)
        sites = target_names(model, self.target_modules, heads, RULES)
        decoder = self.shift is None and is_decoder(model)
        plan: dict[str, Placement] = {}
        fusing: dict[str, ScaleShift] = {}
        for name in sites:
            layer, adapter = self._site(model, name, decoder)
            plan[name] = Placement(layer, adapter)
            if layer.fuses_activation:
                fusing[name] = adapter
        for name, (activation, kind) in activations_after(model, fusing).items():
            fusing[name].activation = kind
            plan[activation] = Placement(FusedActivation, within=name)
        for name in dict.fromkeys(trained_layers(model, heads)):
            plan[name] = Placement(TrainedCopy, TrainedCopy.of(model.get_submodule(name)))
        return plan

    def _site(
        self, model: nn.Module, name: str, decoder: bool
    ) -> tuple[type[ScaleShiftLayer], ScaleShift]:
        module = model.get_submodule(name)
        layer = layer_for(module)
        assert layer is not None
        by_class = channel_dim_of(module, layer)
        channel_dim = self.channel_dim if by_class is None else by_class
        if channel_dim is None:
            raise ValueError(
                f"channel_dim: {name}, a {type(module).__name__}, may have its channels last or in "
                "dimension 1; say which in the config, -1 or 1"
            )
        shift = self.shift
        if shift is None:
            shift = not decoder and getattr(module, "bias", None) is not None
        # a norm without a weight is of the model's dtype and on its device
        weight = next(chain(module.parameters(), model.parameters()), None)
        double = weight is not None and weight.dtype == torch.float64
        adapter = layer.new_adapter(
            module,
            channel_dim,
            shift=shift,
            init_std=self.init_std,
            device=None if weight is None else weight.device,
            dtype=torch.float64 if double else torch.float32,
        )
        return layer, adapter

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> ScaleShiftConfig:
        return cls(**options)
