"""The linear layers of which selected entries train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from partune.nn._layers import Adapters
from partune.nn._sparse_entries import SparseEntries
from partune.nn._sparse_groups import KEY, leave, output_of
from partune.nn._sparse_writing import WATCHED, WrittenLayer, is_watched, unwatch, watch
from partune.nn._targets import is_conv1d
from partune.ops import gather_csr
from partune.ops._checks import FLOATING
from partune.ops.sparse_linear import sparse_linears
from partune.selection import GradientMagnitude, Selection
from partune.selection.budget import DEFAULT_DENSITY, Layout, check_budget, settle_budget
from partune.selection.protocol import observes

_OWN_ALONE = (KEY, WATCHED)  # of a layer's attributes, what copies don't take over


class SparseLayer(WrittenLayer):
    """A linear layer whose frozen weight holds entries that train."""

    children_name = "sparse"
    subtracts = True
    transposed = False

    bias: Any

    def entered(self) -> None:
        self.adapter.put_in_(self.weight)
        watch(self)

    def left(self) -> None:
        leave(self)
        unwatch(self)
        if not self.adapter.stays:
            self.adapter.take_out_(self.weight)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _OWN_ALONE}

    def __setstate__(self, state: Any) -> None:
        """Copies and pickles have values of their own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        watch(self)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return output_of(self, input)
        return self.compute([self], input)[0]

    def compute(self, members: Sequence[SparseLayer], input: Tensor) -> tuple[Tensor, ...]:
        """The outputs of this layer, and of others that read the same input."""
        adapters = [member.adapter for member in members]
        weights = [member.weight for member in members]
        values = [adapter.values for adapter in adapters]
        if not torch.compiler.is_compiling():
            for member, adapter, value in zip(members, adapters, values, strict=True):
                member._refuse_stale(adapter, value)
        return sparse_linears(
            input, weights, [member.bias for member in members], values,
            [adapter.csr for adapter in adapters], transposed=self.transposed,
        )  # fmt: skip

    def _refuse_stale(self, entries: SparseEntries, values: Tensor) -> None:
        if not is_watched(self, values):
            raise RuntimeError(
                "values: got a parameter that replaced the layer's own (as FSDP or functional_call "
                "do), so the optimizer's steps don't reach the weight; train it unsharded, for "
                "example under DistributedDataParallel"
            )
        if values._version != entries.written_version and not entries.is_written(self.weight):
            raise RuntimeError(
                "values: they have changed since they were written into the weight; call "
                "partune.nn.write_back_(model) after whatever changed them but an optimizer's step"
            )

    def merged(self) -> dict[str, Tensor]:
        return {}  # the weight holds them

    def settle(self) -> None:
        self.write_back_()
        self.adapter.stays = True

    @classmethod
    def subtracted(cls, module: nn.Module, adapter: nn.Module) -> dict[str, Tensor]:
        return {}  # activating leaves them, and deactivating exchanges them again

    @classmethod
    def file_tensors(cls, module: nn.Module, adapter: nn.Module) -> dict[str, Tensor]:
        assert isinstance(adapter, SparseEntries)
        tensors: dict[str, Tensor] = adapter.state_dict()
        if tensors.pop("original", None) is not None and adapter.touched_col_indices is not None:
            assert isinstance(module.weight, Tensor)
            tensors["trained"] = gather_csr(module.weight.detach(), *adapter.touched)
        return tensors

    @classmethod
    def make_room(cls, adapter: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(adapter, SparseEntries)
        adapter.make_room(tensors)


class SparseLinear(SparseLayer, nn.Linear):
    """nn.Linear whose weight is frozen but for selected entries, which train as a vector.

    What `attach` turns a model's linear layers into; by itself it replaces one by hand, and
    `from_linear` makes one of a layer that is there. `weight` and `bias` keep their keys in the
    state_dict, and the weight always holds what was trained. The vector is
    `sparse.default.values`: absolute weights, so that an optimizer's weight decay shrinks weights;
    float32 also beside 16-bit weights, whose float32 master it then is. Its gradient is formed at
    the selected entries alone. After each step of an optimizer of torch's class the values are
    written into the weight; whatever else changes them has to be followed by `write_back_`. So an
    optimizer that computes the loss several times in a step (LBFGS) can't train it.

    Args:
        in_features, out_features, bias: of the layer.
        selection: which entries, chosen from the weight as it is initialised; see
            `partune.selection`. Not by gradients, which are never formed as a whole.
        density: the share of the weight that trains, k = floor(density·out·in).
        budget_rank: instead, as many entries as a LoRA of this rank has parameters.
        device, dtype: of weight and bias.

    Shape:
        input [..., in_features], output [..., out_features], of the weight's dtype; values [k].

    Raises:
        TypeError: no selection.
        ValueError: a selection by gradients, a density or budget_rank out of range, or both.
            In a forward, RuntimeError: values that changed and weren't written.

    Reference: LIFT (arXiv 2506.00772), section 3.

    Example:
        >>> from partune.selection import Magnitude
        >>> layer = SparseLinear(64, 32, selection=Magnitude(), density=0.05)
        >>> layer(torch.ones(2, 7, 64)).sum().backward()
        >>> layer.adapter.values.grad.shape, layer.weight.grad
        (torch.Size([102]), None)
    """

    original_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        selection: Selection,
        density: float | None = DEFAULT_DENSITY,
        budget_rank: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._select(selection, density, budget_rank)

    def _select(self, selection: Selection, density: float | None, budget_rank: int | None) -> None:
        check_selection(selection)
        k = entries_of(self.weight, settled(density, budget_rank))
        entries = SparseEntries(self.weight, k, selection).train(self.training)
        entries.select_(self.weight)
        self.requires_grad_(False)
        self.sparse = Adapters({"default": entries})
        self.active_adapter = "default"
        self.entered()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        selection: Selection,
        density: float | None = DEFAULT_DENSITY,
        budget_rank: int | None = None,
    ) -> SparseLinear:
        """Train selected entries of a linear layer; its weight and bias are shared, and frozen.

        Args:
            linear: keeps its class; its weight changes as the values train.
            selection, density, budget_rank: as for `SparseLinear`.

        Raises:
            TypeError: no nn.Linear, or one whose class computes its output in a way of its own; a
                weight that is quantised or sharded; no selection.
            ValueError: as `SparseLinear` does.

        Example:
            >>> from partune.selection import Magnitude
            >>> linear = nn.Linear(64, 32)
            >>> layer = SparseLinear.from_linear(linear, selection=Magnitude(), budget_rank=2)
            >>> layer.weight is linear.weight, layer.adapter.values.numel()
            (True, 192)
        """
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            raise TypeError(
                f"linear: got {type(linear).__name__}, want an nn.Linear; attach(model, "
                "SparseConfig()) takes GPT-2's Conv1D too"
            )
        check_weight("linear", linear.weight)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        layer._select(selection, density, budget_rank)
        return layer

    def to_linear(self) -> nn.Linear:
        """A plain layer of its own that computes the same.

        Example:
            >>> from partune.selection import Magnitude
            >>> type(SparseLinear(64, 32, selection=Magnitude()).to_linear())
            <class 'torch.nn.modules.linear.Linear'>
        """
        self.write_back_()
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        plain.weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone())
        return plain.train(self.training)


class SparseConv1D(SparseLayer):
    """transformers' linear layer of GPT-2, whose weight is transposed."""

    transposed = True


def layer_for(module: nn.Module) -> type[SparseLayer] | None:
    """What a module becomes; None where it is no linear layer that computes x Wᵀ + b itself."""
    if is_conv1d(module):
        return SparseConv1D
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return SparseLinear if plain else None


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse a weight whose entries can't be written."""
    wrapped = hasattr(type(weight), "__tensor_flatten__")
    if wrapped or weight.dtype not in FLOATING or weight.layout != torch.strided:
        what = type(weight).__name__ if wrapped else f"{weight.dtype}, {weight.layout}"
        raise TypeError(
            f"{name}: got a weight that is a {what}, want a strided one of float64, float32, "
            "bfloat16 or float16; quantised weights take BlockLoRAConfig, sharded ones can't "
            "be written into"
        )
    if weight.is_meta:
        raise ValueError(f"{name}: its weight is on the meta device; load the weights first")


def check_selection(selection: object) -> None:
    """Refuse what is no selection, and one that needs gradients."""
    if not isinstance(selection, Selection) or isinstance(selection, type):
        raise TypeError(
            f"selection: got {selection!r}, want an object with init, observe_ and propose, for "
            "example partune.selection.PrincipalWeights(rank=128)"
        )
    if isinstance(selection, GradientMagnitude) or observes(selection):
        raise ValueError(
            f"selection: got {type(selection).__name__}, which selects by gradients; layers never "
            "form them as a whole, so use partune.optim.SparseAdamW with it"
        )


def settled(density: float | None, budget_rank: int | None) -> dict[str, Any]:
    """The budget as options of a group, with one of both.

    Raises:
        ValueError: both, neither, or one out of range.
    """
    budget: dict[str, Any] = {"density": density, "budget_rank": budget_rank}
    settle_budget(budget, budget)
    check_budget(budget["density"], budget["budget_rank"])
    return budget


def entries_of(weight: Tensor, budget: Mapping[str, Any]) -> int:
    return Layout.of(weight).selected_per_slice(budget)
