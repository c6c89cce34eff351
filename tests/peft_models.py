"""What the tests of peft share: models, inputs and what is compared."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from nn_models import OWN, disturbed, inputs_of, output_of, transformers_model

TOLERANCE = 1e-5  # relative to the largest output, in float32


@torch.no_grad()
def move_ups(model: nn.Module, adapter: str = "default") -> nn.Module:
    """Give up-projections, which start at zero, values that hang on their layers' names alone."""
    for name, parameter in model.named_parameters():
        layer, here, leaf = name.removeprefix("base_model.model.").rpartition(f".{adapter}.")
        if here and leaf.endswith("up"):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{layer}.{leaf}".encode()))
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def in_peft(model: nn.Module, config: PeftConfig, name: str = "default") -> PeftModel:
    """The model in peft, with an adapter that does something."""
    return move_ups(get_peft_model(model, config, adapter_name=name), name)


def model_and_output(kind: str, **options: Any) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A model, and what computes its output on some input, without gradients."""
    torch.manual_seed(0)
    if kind in OWN:
        images = torch.randn(2, 3, 16, 16)
        model, run = disturbed(OWN[kind]()), lambda model: model(images)
    else:
        inputs = inputs_of(kind)
        model, run = transformers_model(kind, **options), lambda model: output_of(model, inputs)
    return model, torch.no_grad()(run)


@torch.no_grad()
def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def plain_state(model: nn.Module) -> list[tuple[str, type, Any]]:
    """Names, classes and what each module has beside its tensors' values."""
    return [
        (name, type(module), sorted(vars(module)), sorted(dict(module.named_parameters())))
        for name, module in model.named_modules()
    ]


def copy_of_state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], v) for k, v in state.items())
