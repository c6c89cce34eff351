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

from partune.optim._refresh import selection_states
from partune.optim._update import Call, is_known_zero
from partune.selection.protocol import observes

_OPTIONS = (
    "betas", "weight_decay", "eps", "eps_mode", "maximize", "seed", "skip_nonfinite", "selection",
)  # fmt: skip
_STATE = (
    "exp_avg", "exp_avg_sq", "step", "parameter_id", "master", "crow_indices", "col_indices",
    "selection",
)  # fmt: skip


def _options(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(name) for name in _OPTIONS)


class _Member:
    """A parameter that was stepped, and what must be as it was for the same call to be made."""

    def __init__(self, parameter: Tensor, state: dict[str, Any]) -> None:
        assert parameter.grad is not None
        self.parameter, self.state = parameter, state
        self._selections = selection_states(state) if "selection" in state else []
        self._values = [state.get(name) for name in _STATE]
        self._address = parameter.data_ptr()
        self._dtype, self._strides = parameter.grad.dtype, parameter.stride()

    def count(self) -> None:
        """Count the step for the selection, which is only due at some."""
        for selection in self._selections:
            selection["step"] += 1

    def gradient(self, interval: int | None) -> Tensor | None:
        """The gradient; None where the call wouldn't be the same.

        Args:
            interval: steps between selections; None or 0: none is due.
        """
        parameter, grad = self.parameter, self.parameter.grad
        if interval and any((own["step"] + 1) % interval == 0 for own in self._selections):
            return None
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

    @staticmethod
    def of(param_groups: Sequence[dict[str, Any]], calls: Sequence[Call]) -> LastStep | None:
        """None where each step looks at its gradients before it is taken."""
        for group in param_groups:
            selection = group.get("selection")
            if group["skip_nonfinite"] or (selection is not None and observes(selection)):
                return None
        return LastStep(param_groups, calls)

    def __init__(self, param_groups: Sequence[dict[str, Any]], calls: Sequence[Call]) -> None:
        self._groups = [(group, list(group["params"]), _options(group)) for group in param_groups]
        self._calls = calls
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

    def take_again(
        self, param_groups: Sequence[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]]
    ) -> bool:
        """Take the step with new gradients, where that is what the next one would do."""
        if any(is_known_zero(group["lr"]) for group in param_groups):
            return False
        gradients = self._gradients(param_groups, states)
        if gradients is None:
            return False
        for call, members, grads in zip(self._calls, self._members, gradients, strict=True):
            for member in members:
                member.count()
            call.run(grads, None, None, again=True)
        return True

    def _gradients(
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
        if any(parameter.grad is not None for parameter in self._others):
            return None
        gradients: list[list[Tensor]] = []
        for call, members in zip(self._calls, self._members, strict=True):
            interval = call.group.get("refresh_interval")
            gradients.append([])
            for member in members:
                grad = member.gradient(interval)
                if grad is None or states.get(member.parameter) is not member.state:
                    return None
                gradients[-1].append(grad)
        return gradients
