"""The frozen layers that Block-LoRA goes beside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from partune.nn._layers import AdaptedLayer, Adapters, computes_with
from partune.nn._targets import is_conv1d
from partune.nn.block_lora import BLOCKS, RANK, BlockLoRA, LowRank, is_wrapped


class BlockLoRALayer(AdaptedLayer):
    """A linear layer with low-rank factors beside it."""

    children_name = "block_lora"
    mixes = True
    subtracts = True

    weight: Any
    bias: Any
    adapter: LowRank

    @classmethod
    def features(cls, module: nn.Module) -> tuple[int, int]:
        """How many a module of the original class takes and gives."""
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]

    def merged(self) -> dict[str, Tensor]:
        return {"weight": self._added(self, self.adapter, 1.0)}

    @classmethod
    def subtracted(cls, module: nn.Module, adapter: nn.Module) -> dict[str, Tensor]:
        assert isinstance(adapter, LowRank)
        return {"weight": cls._added(module, adapter, -1.0)}

    @classmethod
    def _added(cls, module: nn.Module, adapter: LowRank, sign: float) -> Tensor:
        weight: Any = getattr(module, "weight", None)
        if _is_quantised(weight):
            raise ValueError(
                "its weight is quantised, and merging would round it anew; leave the adapter "
                "unmerged, or load the base unquantised and merge into that"
            )
        delta = cls._as_weight(adapter.delta())
        wide = torch.promote_types(delta.dtype, weight.dtype)
        total: Tensor = weight.detach().to(wide).add(delta.to(weight.device, wide), alpha=sign)
        return total

    @classmethod
    def _as_weight(cls, delta: Tensor) -> Tensor:
        return delta

    @staticmethod
    def of_rows(adapter: nn.Module, input: Tensor, base: Tensor) -> Tensor:
        output: Tensor = adapter(input, base, reuse=True)
        return output


def _is_quantised(weight: Any) -> bool:
    plain = isinstance(weight, Tensor) and weight.is_floating_point()
    # bitsandbytes may store its 4 bits as floats
    return not plain or is_wrapped(weight) or hasattr(weight, "quant_state")


class BlockLoRALinear(BlockLoRALayer, nn.Linear):
    """nn.Linear with its weight and bias frozen and low-rank factors that train: Block-LoRA.

    What `attach` turns a model's linear layers into; by itself it replaces one by hand, and
    `from_linear` makes one of a layer that is there. `weight` and `bias` keep their keys in the
    state_dict, the factors are `block_lora.default.down` and `block_lora.default.up`.

    Args:
        in_features, out_features, bias: of the layer.
        rank, blocks, share, alpha, dropout, scaling: as for `BlockLoRA`.
        device, dtype: of weight and bias. The factors are float32 beside 16-bit weights.

    Shape:
        input [..., in_features], output [..., out_features], of the weight's dtype.

    Raises:
        ValueError: as `BlockLoRA` does.

    Reference: arXiv 2501.16720, as `BlockLoRA` reads it.

    Example:
        >>> layer = BlockLoRALinear(64, 32, rank=4, blocks=8)
        >>> layer(torch.ones(2, 7, 64)).shape
        torch.Size([2, 7, 32])
        >>> [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        ['block_lora.default.down', 'block_lora.default.up']
    """

    original_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = RANK,
        blocks: int = BLOCKS,
        share: str = "input",
        alpha: float | None = None,
        dropout: float = 0.0,
        scaling: str = "standard",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._freeze(
            dict(
                rank=rank, blocks=blocks, share=share, alpha=alpha, dropout=dropout, scaling=scaling
            )
        )

    def _freeze(self, options: dict[str, Any]) -> None:
        """Put factors beside the weight, which doesn't train any more."""
        factors = BlockLoRA(
            self.in_features, self.out_features, device=self.weight.device,
            dtype=dtype_beside(self.weight), **options,
        )  # fmt: skip
        self.requires_grad_(False)
        self.block_lora = Adapters({"default": factors.train(self.training)})
        self.active_adapter = "default"

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> BlockLoRALinear:
        """Put factors beside a linear layer; its weight and bias are shared, and frozen.

        Args:
            linear: stays as it is, but that its weight and bias don't train any more.
            options: rank, blocks, share, alpha, dropout and scaling, as for `BlockLoRA`.

        Raises:
            TypeError: no nn.Linear, or one whose class computes its output in a way of its own.
            ValueError: as `BlockLoRA` does.

        Example:
            >>> linear = nn.Linear(64, 32)
            >>> layer = BlockLoRALinear.from_linear(linear, rank=4)
            >>> layer.weight is linear.weight
            True
        """
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            raise TypeError(
                f"linear: got {type(linear).__name__}, want an nn.Linear; attach(model, "
                "BlockLoRAConfig()) takes layers of other kinds"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        layer._freeze(options)
        return layer

    def to_linear(self) -> nn.Linear:
        """A plain layer of its own that computes the same, merged in float32.

        Raises:
            ValueError: a quantised weight.

        Example:
            >>> layer = BlockLoRALinear(64, 32)
            >>> type(layer.to_linear())
            <class 'torch.nn.modules.linear.Linear'>
        """
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        plain.weight = nn.Parameter(self.merged()["weight"].to(self.weight.dtype))
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone())
        return plain.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        return self.adapter.linear(input, self.weight, self.bias)


class BlockLoRAConv1D(BlockLoRALayer):
    """transformers' linear layer of GPT-2, whose weight is transposed."""

    @classmethod
    def features(cls, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module.weight, Tensor)
        return module.weight.shape[0], module.weight.shape[1]

    @classmethod
    def _as_weight(cls, delta: Tensor) -> Tensor:
        return delta.t()

    def forward(self, input: Tensor) -> Tensor:
        return self.adapter.linear(input, self.weight.t(), self.bias)


class BlockLoRAOther(BlockLoRALayer):
    """A linear layer that computes its output in a way of its own, such as a quantised one."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = super().forward(input, *args, **kwargs)
        fresh = self.original_class.__module__.startswith("bitsandbytes.")  # nothing else sees it
        output: Tensor = self.adapter(input, base, reuse=fresh)
        return output

    def merged(self) -> dict[str, Tensor]:
        merged = super().merged()
        input = torch.randn(3, self.features(self)[0], generator=torch.Generator().manual_seed(0))
        if not computes_with(self, merged, input.to(self.weight)):
            raise ValueError(
                f"a {self.original_class.__name__} computes its output in a way of its own, into "
                "which a product can't be merged; leave the adapter unmerged"
            )
        return merged


def layer_for(module: nn.Module) -> type[BlockLoRALayer] | None:
    """What a module becomes; None where it is no linear layer."""
    if is_conv1d(module):
        return BlockLoRAConv1D
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    whole = all(isinstance(child, Adapters) for child in module.children())
    if not all(isinstance(size, int) for size in sizes) or not whole:
        return None
    return BlockLoRALinear if type(module).forward is nn.Linear.forward else BlockLoRAOther


def dtype_beside(weight: Tensor | None) -> torch.dtype:
    """Of factors beside a weight: float32, also where the weight is of 16 bits or quantised."""
    double = weight is not None and weight.dtype == torch.float64
    return torch.float64 if double else torch.float32
