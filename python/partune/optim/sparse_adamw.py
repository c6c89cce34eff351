"""AdamW on a selection of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from partune.ops.csr import mask_from_csr
from partune.optim import _update as update_
from partune.optim._checkpoint import plain_selections, restore
from partune.optim._last_step import LastStep
from partune.optim._options import (
    check_options,
    check_parameters,
    is_selected,
    warn_about_budget,
)
from partune.optim._report import Report, report
from partune.selection import Selection
from partune.selection.budget import DEFAULT_DENSITY, Layout, settle_budget


class SparseAdamW(Optimizer):
    """Train the selected entries of each matrix with AdamW, and keep state for those alone.

    Parameters of two and more dimensions are selected from, others are stepped whole; so is a group
    with `selection=None`. A 3-D parameter (stacked experts) is selected per slice. `step()` selects
    from the weights before the update, first where nothing is selected yet, then at every step
    number divisible by `refresh_interval`. Moments stay where the old and the new selection meet
    and start from zero elsewhere; deselected weights keep their value. A parameter with lr 0 and a
    zero gradient is passed over.

    `state[p]` holds crow_indices (int64), col_indices (int32), exp_avg, exp_avg_sq, step, master
    (where there is one), parameter_id, the selection's own state, and kept_entries, the number of
    entries that the last refresh kept.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as for `torch.optim.AdamW`; weight decay
            acts on selected entries. Every keyword may differ between groups.
        selection: which entries, see `partune.selection`; None: all.
        density: the share of each matrix, k = floor(density·rows·columns).
        budget_rank: instead, as many entries as a LoRA of this rank has parameters.
        block: rows and columns of what is selected as one, see `partune.selection.topk_csr`; it
            divides every matrix, and k is that of whole blocks.
        refresh_interval: steps between selections; None or 0: select once.
        eps_mode: "corrected" adds eps to the bias-corrected denominator as torch does,
            "uncorrected" to the plain one as LIFT's released code does.
        master_weights: whether 16-bit weights get a float32 master of their selected entries
            (None: yes); without one they are rounded stochastically.
        state_dtype: of the moments; None: float32 (float64 for float64 weights). torch.bfloat16 is
            rounded stochastically.
        skip_nonfinite: leave out the whole step, all groups, when a selected gradient entry is NaN
            or infinite. One group asking for it is enough.
        seed: of stochastic rounding.
        amsgrad, foreach, capturable, differentiable, fused: unsupported; accepted when off.

    Raises:
        TypeError, ValueError: an option or a parameter that cannot be; the message says which.

    Example:
        >>> from partune.selection import Magnitude
        >>> weight = torch.nn.Parameter(torch.eye(4))
        >>> optimizer = SparseAdamW([weight], lr=0.1, selection=Magnitude(), density=0.25)
        >>> weight.sum().backward(); optimizer.step(); int(optimizer.selected(weight).sum())
        4
    """

    _step_supports_amp_scaling = True
    _last_step: LastStep | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        selection: Selection | None,
        density: float | None = DEFAULT_DENSITY,
        budget_rank: int | None = None,
        block: tuple[int, int] = (1, 1),
        refresh_interval: int | None = 200,
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
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, selection=selection,
            density=density, budget_rank=budget_rank, block=block,
            refresh_interval=refresh_interval, eps_mode=eps_mode, master_weights=master_weights,
            state_dtype=state_dtype, maximize=maximize, skip_nonfinite=skip_nonfinite, seed=seed,
            amsgrad=amsgrad, foreach=foreach, capturable=capturable,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        settle_budget(defaults, {"density": None, "budget_rank": None})
        check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with options of its own; a refused group changes nothing."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group: got {type(param_group).__name__}, want a dict")
        explicit = param_group.get("selection") is not None
        group = dict(param_group)
        settle_budget(group, self.defaults)
        super().add_param_group(group)
        try:
            check_options(group)
            check_parameters(group, explicit)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        warn_about_budget(group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Select where it is due, then update the selected entries; gradients are only read.

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
        updates = update_.with_gradient(update_.collect_updates(self.param_groups, self.state))
        update_.correct_counts(updates)
        revocable = any(group["skip_nonfinite"] for group in self.param_groups)
        if update_.must_know(updates):
            if found_inf is not None and found_inf.item() != 0:
                return loss
            found_inf = None
            for update in updates:
                if update.due:
                    update_.choose_in_step(update, grad_scale, revocable=revocable)
                    if not revocable:
                        update_.install_choice(update, self.state)
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
    def select(self) -> None:
        """Select now, for every parameter that is selected from; no step is taken.

        Raises:
            ValueError: a selection by gradients where a parameter has none.
        """
        self._last_step = None
        for update in update_.collect_updates(self.param_groups, self.state):
            if update.selected:
                update_.choose_on_demand(update)
                update_.install_choice(update, self.state)

    def selected(self, parameter: Tensor) -> Tensor:
        """The entries of a parameter that train, as a bool mask of its shape.

        All of them for a parameter stepped whole, none before the first selection.

        Raises:
            KeyError: a parameter that the optimizer does not have.
        """
        for group in self.param_groups:
            if any(parameter is p for p in group["params"]):
                break
        else:
            raise KeyError("parameter: got one that this optimizer does not have")
        if not is_selected(parameter, group):
            return torch.ones_like(parameter, dtype=torch.bool)
        state = self.state.get(parameter, {})
        if "crow_indices" not in state:
            return torch.zeros_like(parameter, dtype=torch.bool)
        columns = Layout.of(parameter).columns
        mask = mask_from_csr(state["crow_indices"], state["col_indices"], columns)
        return mask.view(parameter.shape)

    def report(self) -> Report:
        """What is selected of every parameter, and how far the last step moved it."""
        return report(self.param_groups, self.state)

    def state_dict(self) -> StateDict:
        """The state as `torch.optim.Optimizer` packs it, selections described as plain data."""
        with plain_selections(self.param_groups):
            return super().state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a checkpoint: every dtype as it was saved, every device the parameter's.

        Options come from the checkpoint, except the selections, which must be those it was made
        with. Everything is checked first: a failed load changes nothing.

        Raises:
            TypeError, ValueError: a checkpoint that doesn't fit; the message says where.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        self.__setstate__(restore(self.param_groups, state_dict))
        self._last_step = None
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
