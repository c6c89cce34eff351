"""The linear layers of which selected entries train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from partune.nn._layers import Adapters
from partune.nn._sparse_entries import SparseEntries
from partune.nn._sparse_groups import leave, output_of
from partune.nn._sparse_writing import Parts, WrittenLayer
from partune.ops._checks import FLOATING
from partune.ops.sparse_linear import sparse_linears
from partune.selection import GradientMagnitude, Selection
from partune.selection.budget import (
    DEFAULT_DENSITY,
    Block,
    Layout,
    check_block,
    check_budget,
    settle_budget,
)
from partune.selection.protocol import observes


class SparseLayer(WrittenLayer):
    """A linear layer whose frozen weight holds entries that train."""

    transposed = False

    weight: Any
    bias: Any
    adapter: SparseEntries

    @classmethod
    def weights_of(cls, module: nn.Module) -> dict[str, Tensor]:
        assert isinstance(module.weight, Tensor)
        return {"": module.weight}

    @classmethod
    def adapter_of(cls, entries: Mapping[str, SparseEntries]) -> nn.Module:
        return entries[""]

    @classmethod
    def parts_of(cls, module: nn.Module, adapter: nn.Module) -> Parts:
        return {"": (adapter, module.weight)}  # type: ignore[dict-item]

    def left(self) -> None:
        leave(self)
        super().left()

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
                member.refuse_stale(adapter, value, member.weight)
        return sparse_linears(
            input, weights, [member.bias for member in members], values,
            [adapter.csr for adapter in adapters], transposed=self.transposed,
            blocks=[adapter.in_blocks for adapter in adapters],
        )  # fmt: skip


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
        block: rows and columns of what is selected as one, see `partune.selection.topk_csr`; k is
            that of whole blocks. Of rows and columns divisible by 4 the gradient takes less time.
        device, dtype: of weight and bias.

    Shape:
        input [..., in_features], output [..., out_features], of the weight's dtype; values [k].

    Raises:
        TypeError: no selection.
        ValueError: a selection by gradients, a density or budget_rank out of range, or both; blocks
            that don't divide the weight.
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
        block: Block = (1, 1),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._select(selection, settled(density, budget_rank, block))

    def _select(self, selection: Selection, budget: Mapping[str, Any]) -> None:
        check_selection(selection)
        entries = entries_of(self.weight, selection, budget).train(self.training)
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
        block: Block = (1, 1),
    ) -> SparseLinear:
        """Train selected entries of a linear layer; its weight and bias are shared, and frozen.

        Args:
            linear: keeps its class; its weight changes as the values train.
            selection, density, budget_rank, block: as for `SparseLinear`.

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
        layer._select(selection, settled(density, budget_rank, block))
        return layer

    def to_linear(self) -> nn.Linear:
        """A plain layer of its own that computes the same.

        Example:
            >>> from partune.selection import Magnitude
            >>> type(SparseLinear(64, 32, selection=Magnitude()).to_linear())
            <class 'torch.nn.modules.linear.Linear'>
        """
        self.adapter.write_(self.weight)
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        plain.weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone())
        return plain.train(self.training)


class SparseConv1D(SparseLayer):
    """transformers' linear layer of GPT-2, whose weight is transposed."""

    transposed = True


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
    if weight.dim() > 2 and not weight.is_contiguous():
        raise ValueError(
            f"{name}: got strides {weight.stride()} for shape {tuple(weight.shape)}, want a "
            "contiguous weight"
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


def settled(density: float | None, budget_rank: int | None, block: Block) -> dict[str, Any]:
    """The budget as options of a group, with one of density and budget_rank.

    Raises:
        ValueError: both, neither, or one out of range; a block that is none.
    """
    budget: dict[str, Any] = {"density": density, "budget_rank": budget_rank, "block": block}
    settle_budget(budget, budget)
    check_budget(budget["density"], budget["budget_rank"])
    check_block(block)
    return budget


def entries_of(
    weight: Tensor, selection: Selection, budget: Mapping[str, Any], parameter_id: int = 0
) -> SparseEntries:
    """Room for as many entries as the budget has for a weight, none of them selected yet.

    Raises:
        ValueError: blocks that don't divide the weight.
    """
    layout, block = Layout.of(weight), budget["block"]
    layout.check_divided_by(block)
    return SparseEntries(weight, layout.selected_per_slice(budget), selection, block, parameter_id)
