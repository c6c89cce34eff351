"""Philox4x32-10 in plain torch: the random numbers of every device, bit for bit.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. int64 tensors hold 32-bit
words, so products are formed from 16-bit halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product."""
    low = multiplier * (word & 0xFFFF)
    high = multiplier * (word >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def philox_words(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """The four output words of each counter; words are int64 tensors in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    low, high = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ low, low1, high0 ^ c3 ^ high, low0
        low, high = (low + _KEY_STEPS[0]) & _WORD, (high + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def philox(index: Tensor, *, step: int, parameter_id: int, seed: int) -> tuple[Tensor, ...]:
    """Four words per element: key = seed, counter = (index low, high, step, parameter id)."""
    constant = torch.ones_like(index)
    counter = (
        index & _WORD,
        (index >> 32) & _WORD,
        constant * (step & _WORD),
        constant * (parameter_id & _WORD),
    )
    return philox_words(counter, (seed & _WORD, (seed >> 32) & _WORD))
