"""The entries of a frozen weight that train, as a vector, and what of the weight they replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from partune import ops
from partune.ops import gather_csr
from partune.ops._checks import SIXTEEN_BIT
from partune.ops.csr import Csr, csr_from_flat, flat_indices, validate_blocks, validate_csr
from partune.ops.sampled_grad import BLOCK
from partune.selection import Selection
from partune.selection.budget import Block, Layout
from partune.selection.choice import Choice, choose, initial_states
from partune.selection.protocol import State

_ALWAYS = ("crow_indices", "col_indices")
_TOUCHED = ("touched_crow_indices", "touched_col_indices")
_TENSORS = (*_ALWAYS, *_TOUCHED, "original", "trained")


class SparseEntries(nn.Module):
    """The selected entries of one weight: `values` trains, a CSR says where they belong.

    The weight is a matrix, or as many matrices as there are stacked experts, [slices, rows,
    columns], which the CSR takes as one below the other.

    `put_in_` exchanges them for the weight's own, `take_out_` exchanges them back. In between the
    weight holds every entry that was ever selected as it was trained, and `original` what was there
    before; otherwise `trained` holds those that `values` doesn't, which are some after a
    reselection. Which were selected, of all selections together, `touched` says.

    The tensors beside `values` are no buffers, which DistributedDataParallel would broadcast in
    every forward; they move with the module, and its state_dict has them.
    """

    values: nn.Parameter
    crow_indices: Tensor
    col_indices: Tensor
    touched_crow_indices: Tensor | None  # None: as the selected ones
    touched_col_indices: Tensor | None
    original: Tensor | None
    trained: Tensor | None

    def __init__(
        self, weight: Tensor, k: int, selection: Selection, block: Block, parameter_id: int = 0
    ) -> None:
        super().__init__()
        layout = Layout.of(weight)
        self.slices, self.columns = layout.slices, layout.columns
        rows, k = layout.slices * layout.rows, layout.slices * k
        self.selection, self.block = selection, block
        self.in_blocks = block[0] % BLOCK == block[1] % BLOCK == 0  # that `sampled_grad_` takes
        self.parameter_id = parameter_id
        self.selection_state: list[State] = []
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.values = nn.Parameter(weight.new_zeros(k, dtype=wide))
        self.crow_indices = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
        self.col_indices = torch.zeros(k, dtype=torch.int32, device=weight.device)
        self.touched_crow_indices = self.touched_col_indices = None
        self.original = self.trained = None
        self.stays = False  # in the weight, when its layer is given back its class
        self.written_version = -1  # of the values, when they were last in the weight

    @property
    def in_weight(self) -> bool:
        return self.original is not None

    @property
    def csr(self) -> Csr:
        return self.crow_indices, self.col_indices

    @property
    def touched(self) -> Csr:
        """Every entry that was ever selected."""
        if self.touched_crow_indices is None or self.touched_col_indices is None:
            return self.csr
        return self.touched_crow_indices, self.touched_col_indices

    # ---- between the values and the weight ----

    def write_(self, weight: Tensor) -> None:
        """Write the values into the weight, rounded to its dtype."""
        write_all_([(self, weight)])

    def is_written(self, weight: Tensor) -> bool:
        """Whether the weight holds the values: by their version, and in doubt by comparison."""
        if self.values._version != self.written_version:
            with torch.no_grad():
                held = gather_csr(_matrix(weight), *self.csr)
                if not torch.equal(held, self.values.to(held.dtype)):
                    return False
            self.written_version = self.values._version
        return True

    @torch.no_grad()
    def put_in_(self, weight: Tensor) -> None:
        """Exchange the weight's own entries for the trained ones."""
        self.stays = False
        if not self.in_weight:
            self.original = gather_csr(_matrix(weight), *self.touched)
            if self.trained is not None:
                _scatter_(weight, self.touched, self.trained)
            self.trained = None
        self.write_(weight)

    @torch.no_grad()
    def take_out_(self, weight: Tensor) -> None:
        """Give the weight its own entries back, bit for bit."""
        if self.original is None:
            return
        self.write_(weight)
        if self.touched_col_indices is not None:
            self.trained = gather_csr(_matrix(weight), *self.touched)
        _scatter_(weight, self.touched, self.original)
        self.original = None

    # ---- selecting ----

    def choose(self, weight: Tensor, selection: Selection, step: int) -> Choice:
        """Ask a selection, before the step of this number; nothing changes yet."""
        layout, states = Layout.of(weight), [dict(state) for state in self.selection_state]
        if not states or selection is not self.selection:
            states = initial_states(selection, weight, layout, self.parameter_id)
        for state in states:
            state["step"] = step
        k = self.values.numel() // self.slices
        return choose(selection, weight, None, layout, states, k, self.block)

    @torch.no_grad()
    def select_(self, weight: Tensor) -> None:
        """Select for the first time; the values are the weight's."""
        choice = self.choose(weight, self.selection, step=1)
        self.crow_indices, self.col_indices = choice.crow_indices, choice.col_indices
        self.selection_state = choice.selection_state
        self.values.copy_(gather_csr(_matrix(weight), *self.csr))

    @torch.no_grad()
    def reselect_(self, weight: Tensor, choice: Choice, followers: list[Tensor]) -> int:
        """Put another choice in force, while the entries are in the weight.

        Tensors that follow the values, such as moments, stay where both choices meet and are zero
        elsewhere. Deselected entries keep their trained value in the weight.

        Returns:
            How many entries are in both.
        """
        assert self.original is not None
        old, new = self.csr, (choice.crow_indices, choice.col_indices)
        touched = _union(self.touched, new, self.columns)
        original = gather_csr(_matrix(weight), *touched)
        ops.remap_([original], [self.original], *self.touched, *touched)
        values = gather_csr(_matrix(weight), *new).to(self.values.dtype)
        kept = int(ops.remap_([values], [self.values.detach()], *old, *new))
        for follower in followers:
            fresh = torch.zeros_like(follower)
            ops.remap_([fresh], [follower], *old, *new)
            follower.copy_(fresh)
        self.values.copy_(values)
        self.written_version = self.values._version
        self.crow_indices, self.col_indices = new
        self.touched_crow_indices, self.touched_col_indices = touched
        self.original, self.selection_state = original, choice.selection_state
        return kept

    # ---- as a module ----

    def _apply(self, fn: Any, recurse: bool = True) -> SparseEntries:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in _TENSORS:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, fn(value))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _TENSORS:
            if getattr(self, name) is not None:
                destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours = {n: state_dict[prefix + n] for n in _TENSORS if prefix + n in state_dict}
        rest = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in ours}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys += [prefix + name for name in _ALWAYS if name not in ours]
        if not ours.keys() >= set(_ALWAYS):
            return
        try:
            self.check(ours)
            if ("original" in ours) != self.in_weight:
                saved, now = ("active", "not") if "original" in ours else ("not active", "it is")
                raise ValueError(f"saved while the adapter was {saved}, and now {now}")
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            return
        for name in _TENSORS:
            value = ours.get(name)
            value = None if value is None else value.detach().to(self.values.device, copy=True)
            setattr(self, name, value)

    def make_room(self, tensors: Mapping[str, Tensor]) -> None:
        """Take on the sizes of a file's tensors, which are checked but not yet read."""
        if not tensors.keys() >= {"values", *_ALWAYS}:
            return
        self.check(tensors)
        if tensors["values"].dtype != self.values.dtype:
            raise TypeError(
                f"values: got {tensors['values'].dtype}, want {self.values.dtype}, beside this "
                "weight"
            )
        for name in _TENSORS:
            if name in tensors:
                setattr(self, name, torch.empty_like(tensors[name], device=self.values.device))

    def file_tensors(self, weight: Tensor) -> dict[str, Tensor]:
        """What a file keeps: no original, but what isn't among the values any more."""
        tensors: dict[str, Tensor] = self.state_dict()
        if tensors.pop("original", None) is not None and self.touched_col_indices is not None:
            tensors["trained"] = gather_csr(_matrix(weight.detach()), *self.touched)
        return tensors

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse tensors that can't belong to this weight.

        Raises:
            TypeError, ValueError: a CSR that isn't one of this weight, or vectors of other lengths.
        """
        rows = self.crow_indices.numel() - 1
        selected = tensors["col_indices"]
        validate_csr(tensors["crow_indices"], selected, rows, self.columns)
        if selected.numel() != self.values.numel():
            raise ValueError(
                f"col_indices: got {selected.numel()} entries, want {self.values.numel()}, as the "
                "config's density or budget_rank has it"
            )
        validate_blocks(tensors["crow_indices"], selected, self.block)
        per_slice = tensors["crow_indices"][:: max(rows // self.slices, 1)].diff()
        if bool((per_slice != selected.numel() // self.slices).any()):
            raise ValueError(
                f"crow_indices: got {per_slice.tolist()} entries, want as many of every matrix"
            )
        refreshed = [name in tensors for name in _TOUCHED]
        if any(refreshed):
            if not all(refreshed):
                raise ValueError(f"touched: got one of {' and '.join(_TOUCHED)}, want both")
            selected = tensors[_TOUCHED[1]]
            validate_csr(tensors[_TOUCHED[0]], selected, rows, self.columns)
        for name in ("original", "trained"):
            if name in tensors and tensors[name].shape != selected.shape:
                raise ValueError(
                    f"{name}: got shape {tuple(tensors[name].shape)}, want {tuple(selected.shape)}"
                )

    @property
    def share(self) -> float:
        """Of the matrix, that is selected."""
        return self.values.numel() / max((self.crow_indices.numel() - 1) * self.columns, 1)

    def extra_repr(self) -> str:
        rows = self.crow_indices.numel() - 1
        return f"{self.values.numel()} of {rows}x{self.columns}, density={self.share:.3g}"


@torch.no_grad()
def write_all_(pairs: Iterable[tuple[SparseEntries, Tensor]]) -> None:
    """Write the values of several into their weights, all those on a device in one call.

    Of several that have one weight the later ones are written by later calls, so that they win.
    """
    calls: dict[tuple[torch.device, int], list[tuple[SparseEntries, Tensor, Tensor]]] = {}
    turns: Counter[int] = Counter()
    for entries, weight in pairs:  # a module looks its parameters up anew each time
        call = weight.device, turns[id(weight)]
        calls.setdefault(call, []).append((entries, weight, entries.values))
        turns[id(weight)] += 1
    for together in calls.values():
        ops.scatter_csr_(
            [_matrix(weight) for _, weight, _ in together],
            [_beside(weight, values) for _, weight, values in together],
            [entries.crow_indices for entries, _, _ in together],
            [entries.col_indices for entries, _, _ in together],
        )
        for entries, _, values in together:
            entries.written_version = values._version


def _scatter_(weight: Tensor, csr: Csr, values: Tensor) -> None:
    ops.scatter_csr_([_matrix(weight)], [_beside(weight, values)], [csr[0]], [csr[1]])


def _matrix(weight: Tensor) -> Tensor:
    """Stacked matrices below one another, to be read and written."""
    return weight if weight.dim() == 2 else weight.view(-1, weight.shape[-1])


def _beside(weight: Tensor, values: Tensor) -> Tensor:
    """Values of a dtype that can be scattered into the weight, where float32 is rounded."""
    rounded = values.dtype == torch.float32 and weight.dtype in SIXTEEN_BIT
    return values if rounded or values.dtype == weight.dtype else values.to(weight.dtype)


def _union(first: Csr, second: Csr, columns: int) -> Csr:
    flat = torch.cat([flat_indices(*first, columns), flat_indices(*second, columns)])
    return csr_from_flat(torch.unique(flat), first[0].numel() - 1, columns)
