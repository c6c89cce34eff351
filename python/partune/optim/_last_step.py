"""The step that was taken last, to be taken again with new gradients.

What a step gathers and checks depends on parameters, state and options, which seldom change from
one step to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from partune.optim._update import Call

_OPTIONS = ("betas", "weight_decay", "eps", "eps_mode", "maximize", "seed", "skip_nonfinite")
_STATE = ("exp_avg", "exp_avg_sq", "step", "parameter_id", "master")


def _options(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group[name] for name in _OPTIONS)


class _Member:
    """A parameter that was stepped, and what must be as it was for the same call to be made."""

    def __init__(self, parameter: Tensor, state: dict[str, Any]) -> None:
        assert parameter.grad is not None
        self.parameter, self.state = parameter, state
        self._values = [state.get(name) for name in _STATE]
        self._address = parameter.data_ptr()
        self._dtype, self._strides = parameter.grad.dtype, parameter.stride()

    def gradient(self) -> Tensor | None:
        """The gradient; None where the call wouldn't be the same."""
        parameter, grad = self.parameter, self.parameter.grad
        if (
            grad is None
            or not parameter.requires_grad
            or parameter.data_ptr() != self._address
            or grad.layout is not torch.strided
            or grad.dtype is not self._dtype
            or grad.stride() != self._strides
            or not all(map(is_, map(self.state.get, _STATE), self._values))
        ):
            return None
        return grad


class LastStep:
    """The calls of a step, and how to tell that the next one makes the same ones."""

    def __init__(self, param_groups: Sequence[dict[str, Any]], calls: Sequence[Call]) -> None:
        self._groups = [(group, list(group["params"]), _options(group)) for group in param_groups]
        self.calls = calls
        self._members = [
            [_Member(*both) for both in zip(call.parameters, call.states, strict=True)]
            for call in calls
        ]
        stepped = {id(parameter) for call in calls for parameter in call.parameters}
        self._others = [
            parameter
            for _, parameters, _ in self._groups
            for parameter in parameters
            if id(parameter) not in stepped
        ]

    def gradients(
        self, param_groups: Sequence[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]]
    ) -> list[list[Tensor]] | None:
        """The gradients for each call; None where the next step isn't the last one again."""
        if len(param_groups) != len(self._groups):
            return None
        for group, (old, parameters, options) in zip(param_groups, self._groups, strict=True):
            if group is not old or len(group["params"]) != len(parameters):
                return None
            if not all(map(is_, group["params"], parameters)) or _options(group) != options:
                return None
        if any(p.grad is not None and p.requires_grad for p in self._others):
            return None
        gradients: list[list[Tensor]] = []
        for members in self._members:
            gradients.append([])
            for member in members:
                grad = member.gradient()
                if grad is None or states.get(member.parameter) is not member.state:
                    return None
                gradients[-1].append(grad)
        return gradients
