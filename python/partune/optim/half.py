"""HFT: AdamW on half of the parameters, another half in each round (arXiv 2404.18466)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT, StateDict
from torch.utils.weak import WeakIdKeyDictionary

from partune.optim import _update as update_
from partune.optim._checkpoint import restore
from partune.optim._half_round import carry_state
from partune.optim._last_step import LastStep
from partune.optim._options import check_options, check_parameters, named_parameters
from partune.selection.half import Half, HalfPlan
from partune.selection.half.live import LiveHalf, live_half

# Parameters whose requires_grad a plan has switched off: another optimizer may switch it on again.
_frozen_by_a_plan = WeakIdKeyDictionary()


class HalfAdamW(Optimizer):
    """Train half of a model's parameters with AdamW; the other half costs nothing and is kept.

    Where a plan freezes a whole parameter it switches `requires_grad` off, so that autograd skips
    its gradient. Where it freezes part of one (a fused matrix, or levels "rows", "columns" and
    "elements"), gradients stay dense and the step updates live entries alone: neither decay nor
    moments reach the others, and there is no state for them. Gradient clipping counts all gradients
    that are there. Parameters that don't require gradients when the optimizer is made stay frozen.

    `state[p]` holds exp_avg, exp_avg_sq, step, master (where there is one) and parameter_id;
    exp_avg has the parameter's shape, or [live rows, columns], [rows, live columns] or [live
    elements] where part of it is live. `plan` is the round's `HalfPlan`: print it.

    Args:
        model_or_params: a model, or its named parameters, or groups of named parameters.
        lr, betas, eps, weight_decay, maximize: as for `torch.optim.AdamW`. Every keyword but `plan`
            may differ between groups.
        plan: what learns: a `Half`, or a `HalfPlan` that was drawn for this model.
        eps_mode, master_weights, state_dtype, seed: as for `SparseAdamW`.
        skip_nonfinite: leave out the whole step, all groups, when a gradient of a parameter that
            learns, frozen entries included, is NaN or infinite.
        amsgrad, foreach, capturable, differentiable, fused: unsupported; accepted when off.

    Raises:
        TypeError, ValueError: an option or a parameter that cannot be; the message says which.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(
        ...     {name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})])})
        >>> optimizer = HalfAdamW(model, lr=1e-3, plan=Half(seed=0))
        >>> sum(p.requires_grad for p in model.parameters())
        4
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        model_or_params: nn.Module | ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        plan: Half | HalfPlan = Half(seed=0),  # noqa: B008  (frozen)
        eps_mode: str = "corrected",
        master_weights: bool | None = None,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        skip_nonfinite: bool = False,
        seed: int = 0,
        amsgrad: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if not isinstance(plan, Half | HalfPlan):
            raise TypeError(f"plan: got {type(plan).__name__}, want a Half or a HalfPlan")
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, eps_mode=eps_mode,
            master_weights=master_weights, state_dtype=state_dtype, maximize=maximize,
            skip_nonfinite=skip_nonfinite, seed=seed, amsgrad=amsgrad, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        check_options(defaults)
        is_model = isinstance(model_or_params, nn.Module)
        config = getattr(model_or_params, "config", None) if is_model else None
        self._heads: int | None = getattr(config, "num_attention_heads", None)
        self.plan: HalfPlan | None = None
        self._last_step: LastStep | None = None
        params: Any = model_or_params
        if isinstance(model_or_params, nn.Module):
            params = list(model_or_params.named_parameters())
        super().__init__(params, defaults)
        # In the plan's structure every parameter counts; only those that may learn are switched.
        self._switched = [
            parameter
            for _, parameter in self._named()
            if parameter.requires_grad or parameter in _frozen_by_a_plan
        ]
        self._adopt(*self._prepared(plan))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters; a refused group changes nothing.

        Raises:
            ValueError: parameters without names, or a group after the plan was drawn.
        """
        if getattr(self, "plan", None) is not None:
            raise ValueError(
                "param_group: got one after the plan was drawn; make the optimizer with all "
                "parameters"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if "param_names" not in group:
                raise ValueError(
                    "params: got parameters without names, by which a plan knows them; pass the "
                    "model or model.named_parameters()"
                )
            check_options(group)
            check_parameters(group, explicit=False)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the live entries of all parameters that have a gradient; gradients are only read.

        Args:
            closure: reevaluates the model, with gradients, and returns the loss.

        Raises:
            RuntimeError: a sparse gradient; nothing is updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # GradScaler hands these over for the length of a step.
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        last, unscaled = self._last_step, found_inf is None and grad_scale is None
        if last and unscaled and last.take_again(self.param_groups, self.state):
            return loss
        self._last_step = None  # what it holds of the state may be replaced, and is freed then
        updates = update_.collect_updates(self.param_groups, self.state, self._halves)
        updates = update_.with_gradient([u for u in updates if u.parameter.requires_grad])
        revocable = any(group["skip_nonfinite"] for group in self.param_groups)
        if update_.must_know(updates):
            if found_inf is not None and found_inf.item() != 0:
                return loss
            found_inf = None
            if revocable and any(bool(f) for f in update_.nonfinite_flags(updates).values()):
                return loss
        elif revocable:
            (nonfinite,) = update_.nonfinite_flags(updates).values()
            found_inf = nonfinite if found_inf is None else torch.maximum(nonfinite, found_inf)
        for update in updates:
            update_.prepare_state(update, self.state, grad_scale)
        calls = update_.step_all(updates, grad_scale, found_inf)
        self._last_step = LastStep.of(self.param_groups, calls)
        return loss

    @torch.no_grad()
    def next_round(self, seed: int | HalfPlan) -> HalfPlan:
        """Begin a round: draw another half, or take a plan that was drawn already.

        State stays where both halves agree and is freed where only the old one has it. What is new
        starts with zero moments; the step of the bias correction goes on. Gradients of what is now
        frozen are dropped.

        Returns:
            The new plan.

        Raises:
            TypeError, ValueError: a seed or a plan that doesn't fit; nothing has changed then.
        """
        old, old_halves = self._drawn(), self._halves
        plan = seed if isinstance(seed, HalfPlan) else replace(old.half, seed=seed)
        new, new_halves = self._prepared(plan)
        taken = max((float(state["step"]) for state in self.state.values() if state), default=0.0)
        ids = {
            u.parameter: u.parameter_id
            for u in update_.collect_updates(self.param_groups, self.state)
        }
        switched = set(self._switched)
        for group in self.param_groups:
            for name, parameter in named_parameters(group):
                if parameter not in switched:
                    continue
                before = old_halves.get(parameter, old.live[name].kind == "all")
                after = new_halves.get(parameter, new.live[name].kind == "all")
                state = carry_state(
                    self.state.get(parameter, {}), parameter, group, ids[parameter], taken,
                    before, after,
                )  # fmt: skip
                self.state.pop(parameter, None)
                if state:
                    self.state[parameter] = state
        self._adopt(new, new_halves)
        return new

    def selected(self, parameter: Tensor) -> Tensor:
        """The entries of a parameter that learn in this round, as a bool mask of its shape.

        Raises:
            KeyError: a parameter that the optimizer does not have.
        """
        if not any(parameter is own for _, own in self._named()):
            raise KeyError("parameter: got one that this optimizer does not have")
        if parameter.requires_grad and parameter in self._halves:
            return self._halves[parameter].mask(parameter)
        return torch.full_like(parameter, parameter.requires_grad, dtype=torch.bool)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a checkpoint and its round: every dtype as it was saved, devices the parameters'.

        Options come from the checkpoint. Everything is checked first: a failed load changes
        nothing.

        Raises:
            TypeError, ValueError: a checkpoint that doesn't fit; the message says where.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        plan, halves = self._prepared(self._saved_plan(state_dict))
        self.__setstate__(restore(self.param_groups, state_dict, halves))
        self._adopt(plan, halves)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _saved_plan(self, state_dict: StateDict) -> HalfPlan:
        """The plan of a checkpoint, drawn again."""
        saved = [group.get("plan") for group in state_dict["param_groups"]]
        if not saved or not isinstance(saved[0], dict) or any(one != saved[0] for one in saved):
            raise ValueError("state_dict: got no plan, so it is no checkpoint of HalfAdamW")
        options = {**saved[0]["half"], "patterns": tuple(map(tuple, saved[0]["half"]["patterns"]))}
        plan = self._drawn()
        if plan.digest() != saved[0]["digest"]:
            plan = self._draw(Half(**options))
        if plan.digest() != saved[0]["digest"]:
            raise ValueError(
                "state_dict: got a plan that this model doesn't give, drawn for other parameters "
                "or read from a file; begin its round with next_round(plan) before loading"
            )
        return plan

    def _named(self) -> Iterable[tuple[str, Tensor]]:
        for group in self.param_groups:
            yield from named_parameters(group)

    def _drawn(self) -> HalfPlan:
        assert self.plan is not None
        return self.plan

    def _draw(self, half: Half) -> HalfPlan:
        return half.plan(dict(self._named()), heads=self._heads)

    def _prepared(self, plan: Half | HalfPlan) -> tuple[HalfPlan, dict[Tensor, LiveHalf]]:
        """A plan that fits the parameters, and the halves of those that are live in part."""
        if isinstance(plan, Half):
            plan = self._draw(plan)
        shapes = {name: tuple(parameter.shape) for name, parameter in self._named()}
        if shapes != plan.shapes:
            different = sorted(
                name
                for name in shapes.keys() | plan.shapes.keys()
                if shapes.get(name) != plan.shapes.get(name)
            )
            raise ValueError(f"plan: got one of another model, which differs in {different[0]}")
        halves = {}
        for name, parameter in self._named():
            half = live_half(plan, name, parameter)
            if half is not None and parameter.dim() != 2 and not parameter.is_contiguous():
                raise ValueError(
                    f"{name}: got strides {parameter.stride()}, want a contiguous parameter, of "
                    f"which part learns"
                )
            if half is not None:
                halves[parameter] = half
        return plan, halves

    def _adopt(self, plan: HalfPlan, halves: dict[Tensor, LiveHalf]) -> None:
        """Put a plan in force."""
        self.plan, self._halves, self._last_step = plan, halves, None
        frozen = {p for name, p in self._named() if plan.live[name].kind == "none"}
        for parameter in self._switched:
            parameter.requires_grad_(parameter not in frozen)
            if parameter in frozen:
                parameter.grad = None
                _frozen_by_a_plan[parameter] = True
            elif parameter in _frozen_by_a_plan:
                del _frozen_by_a_plan[parameter]
        saved = {"half": asdict(plan.half), "digest": plan.digest()}
        for group in self.param_groups:
            group["plan"] = saved
