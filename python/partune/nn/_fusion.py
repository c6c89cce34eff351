"""Which GELU directly follows which layer, so that one pass computes both."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn


def activations_after(model: nn.Module, sites: Collection[str]) -> dict[str, tuple[str, str]]:
    """For layers with a GELU of their own behind them: its module's name, and its kind.

    The modules that own both are traced, each by itself: a GELU counts where it is called once,
    with the layer's output and nothing else, and nothing else sees that output.
    """
    found: dict[str, tuple[str, str]] = {}
    uses = _count_uses(model)
    for owner_name, owner in model.named_modules():
        prefix = f"{owner_name}." if owner_name else ""
        kinds = {
            child: kind for child, module in owner.named_children() if (kind := gelu_kind(module))
        }
        layers = {name.removeprefix(prefix) for name in sites if name.startswith(prefix)}
        layers &= {child for child, _ in owner.named_children()}
        if kinds and layers:
            for layer, activation in _pairs(owner):
                named = activation in kinds and layer in layers
                if named and uses[getattr(owner, activation)] == uses[getattr(owner, layer)] == 1:
                    found[prefix + layer] = (prefix + activation, kinds[activation])
    return found


def _count_uses(model: nn.Module) -> dict[nn.Module, int]:
    uses: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        uses[module] = uses.get(module, 0) + 1
    return uses


def gelu_kind(module: nn.Module) -> str | None:
    """ "gelu", "gelu_tanh" or None, by what a module called some GELU computes."""
    if "gelu" not in type(module).__name__.lower() or list(module.parameters()):
        return None
    points = torch.linspace(-6, 6, 97, dtype=torch.float64)
    try:
        with torch.no_grad():
            values = module(points)
    except (RuntimeError, TypeError, ValueError):  # GEGLU and the like
        return None
    for kind, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        wanted = F.gelu(points, approximate=approximate)
        if values.shape == wanted.shape and torch.allclose(values, wanted, rtol=0, atol=1e-8):
            return kind
    return None


class _ChildrenAreLeaves(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _pairs(owner: nn.Module) -> list[tuple[str, str]]:
    """Children that are called once each, the second on the first's output alone."""
    try:
        graph = _ChildrenAreLeaves().trace(owner)
    except Exception:  # a forward that can't be traced: nothing is fused
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets: list[Any] = [node.target for node in calls]
    pairs = []
    for node in calls:
        producer = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(producer, torch.fx.Node) or producer.op != "call_module":
            continue
        once = targets.count(node.target) == targets.count(producer.target) == 1
        if once and list(producer.users) == [node]:
            pairs.append((str(producer.target), str(node.target)))
    return pairs
