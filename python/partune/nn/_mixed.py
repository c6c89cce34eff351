"""mixed_adapters: each row of a batch with an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from partune.nn._layers import AdaptedLayer, deactivate, swapped_class
from partune.nn._registry import attached, disable_adapter, locked


class MixedLayer(AdaptedLayer):
    """A layer whose plain output is computed for all rows, and then replaced in some.

    `mixed_rows` says which: the adapter's layer class, the adapter, and its rows.
    """

    mixed_rows: list[tuple[type[AdaptedLayer], nn.Module, Tensor]]
    mixed_count: int

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Tensor = super().forward(input, *args, **kwargs)
        if len(input) != self.mixed_count:
            raise ValueError(
                f"names: got {self.mixed_count} for a {self.original_class.__name__} whose input "
                f"has {len(input)} rows in its first dimension, want one per row"
            )
        changed = []
        for layer, adapter, rows in self.mixed_rows:
            there = rows.to(input.device)
            changed.append(layer.of_rows(adapter, input[there], base[there]).to(base.dtype))
        everywhere = torch.cat([rows for _, _, rows in self.mixed_rows]).to(input.device)
        return base.index_copy(0, everywhere, torch.cat(changed))


@contextmanager
def mixed_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Compute each row of a batch with an adapter of its own, in one pass over the base's weights.

    A row is an index of the first dimension of what the layers get: an example. Inside, all the
    named adapters' parameters train; a backward with gradient checkpointing has to run inside too.
    Afterwards the adapter that was active is active again.

    Args:
        names: one per row; None: the base's output.

    Raises:
        TypeError: one string instead of a list.
        ValueError: a name that isn't attached; an adapter that can't be mixed (SSF's, whose passes
            take one scale for all rows). In a forward: a batch of another size.

    Example:
        >>> from partune.nn import BlockLoRAConfig, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 8)), BlockLoRAConfig(), name="en")
        >>> model = attach(model, BlockLoRAConfig(), name="de")
        >>> with mixed_adapters(model, ["en", None, "de"]):
        ...     model(torch.ones(3, 4)).shape
        torch.Size([3, 8])
    """
    if isinstance(names, str):
        raise TypeError(f"names: got the string {names!r}, want a list with one name per row")
    rows = {name: [i for i, n in enumerate(names) if n == name] for name in names}
    mixed = _mixed_rows(model, {n: torch.tensor(r) for n, r in rows.items() if n is not None})
    with disable_adapter(model), locked(model, "its adapters are mixed; leave that block first"):
        for module, entries in mixed.items():
            module.mixed_rows, module.mixed_count = entries, len(names)  # type: ignore[assignment]
            module.__class__ = swapped_class(type(module), MixedLayer)
            for _, adapter, _ in entries:
                adapter.requires_grad_(True)
        try:
            yield
        finally:
            for module, entries in mixed.items():
                for _, adapter, _ in entries:
                    adapter.requires_grad_(False)
                deactivate(module)
                del module.mixed_rows, module.mixed_count


_Entries = list[tuple[type[AdaptedLayer], nn.Module, Tensor]]


def _mixed_rows(model: nn.Module, rows: dict[str, Tensor]) -> dict[nn.Module, _Entries]:
    """By module: which adapter's layer class and adapter serve which rows."""
    mixed: dict[nn.Module, _Entries] = {}
    for name in rows:
        _, attachment = attached(model, name, "names")
        for layer_name, layer in attachment.holders.items():
            if not layer.mixes:
                raise ValueError(
                    f"names: {name!r} is a {type(attachment.config).__name__}'s adapter, which "
                    "can't be mixed with others in a batch; want those of a BlockLoRAConfig"
                )
            module = model.get_submodule(layer_name)
            adapter = getattr(module, layer.children_name)[name]
            mixed.setdefault(module, []).append((layer, adapter, rows[name]))
    return mixed
