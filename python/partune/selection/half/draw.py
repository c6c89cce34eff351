"""The draw of HFT (arXiv 2404.18466): which units of a model learn in a round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from partune.ops.philox import philox
from partune.selection.half.naming import Unit

_PLAN_ID = 2**32 - 1  # the counter's last word: masks and lines have their own ids there
_UNITS, _POOLS, _LINES = 0, 1, 2**32 - 1  # the third word; masks have 0, rounding from 1 on
_ROUNDING = 1e-9  # shares such as 0.3·10 that floating point misses


def draw_units(
    sizes: Mapping[Unit, int], level: str, ratio: float, balance: str, seed: int
) -> set[Unit]:
    """The units that learn.

    Units fall into pools: by attention, MLP and the norms of a block (level "category"), the
    matrices and the norms of a block ("layer"), or of the model ("model"). A pool of n learns
    ratio·n of its units; where that is no whole number, it is rounded up in as many of the pools of
    n units, drawn at random, as keeps the share of all of them, and down in the others.

    Args:
        sizes: the parameters of each unit.
    """
    units = sorted(sizes)
    words = dict(zip(units, _words(len(units), _UNITS, seed), strict=True))
    pools: dict[tuple[object, ...], list[Unit]] = {}
    for unit in units:
        pools.setdefault(_pool(unit, level), []).append(unit)
    lots = dict(zip(pools, _words(len(pools), _POOLS, seed), strict=True))
    live: set[Unit] = set()
    for alike in _alike(pools):
        count = len(pools[alike[0]])
        share = ratio * count + _ROUNDING
        ups = math.floor((share - math.floor(share)) * len(alike) + _ROUNDING)
        up = set(sorted(alike, key=lambda key: lots[key])[:ups])
        for key in alike:
            wanted = math.floor(share) + (key in up)
            candidates: Sequence[Unit] = pools[key]
            if balance == "parameters":
                candidates = _balanced(candidates, wanted, ratio, sizes, lots[key])
            live |= set(sorted(candidates, key=lambda unit: words[unit])[:wanted])
    return live


def draw_lines(count: int, live: int, seed: int, mask_id: int) -> Tensor:
    """`live` of `count` rows or columns, ascending int32, on the CPU."""
    words = philox(torch.arange(count), step=_LINES, parameter_id=mask_id, seed=seed)[0]
    chosen = torch.sort(words, stable=True).indices[:live]
    return chosen.sort().values.to(torch.int32)


def _words(count: int, step: int, seed: int) -> list[int]:
    words = philox(torch.arange(count), step=step, parameter_id=_PLAN_ID, seed=seed)[0]
    return list(map(int, words.tolist()))


def _pool(unit: Unit, level: str) -> tuple[object, ...]:
    kind = "norm" if unit.category == "norm" else "matrix"
    if level == "model":
        return (kind,)
    if level == "layer":
        return (kind, unit.block)
    return (unit.category, unit.block, unit.group)


def _alike(pools: Mapping[tuple[object, ...], Sequence[Unit]]) -> list[list[tuple[object, ...]]]:
    """The pools of one kind and size."""
    alike: dict[tuple[object, int], list[tuple[object, ...]]] = {}
    for key, units in pools.items():
        alike.setdefault((key[0], len(units)), []).append(key)
    return list(alike.values())


def _balanced(
    units: Sequence[Unit], wanted: int, ratio: float, sizes: Mapping[Unit, int], word: int
) -> Sequence[Unit]:
    """One of the sets of so many units that come closest to the share by parameters."""
    if all(sizes[unit] == sizes[units[0]] for unit in units):
        return units
    target = ratio * sum(sizes[unit] for unit in units)
    sets = list(combinations(units, wanted))
    distances = [abs(sum(sizes[unit] for unit in chosen) - target) for chosen in sets]
    best = [s for s, d in zip(sets, distances, strict=True) if d <= min(distances) + _ROUNDING]
    return best[word % len(best)]
