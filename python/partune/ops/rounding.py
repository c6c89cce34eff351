"""Stochastic rounding of float32 to bfloat16 and float16 in plain torch, bit for bit.

A value is rounded up in magnitude with the probability of its dropped fraction, so that updates far
below the last bit arrive on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF
_INFINITE = 0x7F800000
_HALF_SMALLEST_NORMAL = 0x38800000  # 2**-14
_HALF_OVERFLOW = 0x47800000  # 2**16
_HALF_REBIAS = 112 << 23


def round_stochastic(values: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round float32 `values` to `dtype` with one 32-bit `random` word (int64) each."""
    bits = values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = _bfloat16_bits(bits, random) if dtype == torch.bfloat16 else _half_bits(bits, random)
    return torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16).view(dtype)


def _bfloat16_bits(bits: Tensor, random: Tensor) -> Tensor:
    magnitude = bits & _MAGNITUDE
    finite = (bits + (random & 0xFFFF)) >> 16
    special = (bits >> 16) | (magnitude > _INFINITE).to(torch.int64) * 0x40
    return torch.where(magnitude < _INFINITE, finite, special)


def _half_bits(bits: Tensor, random: Tensor) -> Tensor:
    magnitude = bits & _MAGNITUDE
    raised = magnitude + (random & 0x1FFF)
    normal = torch.where(raised >= _HALF_OVERFLOW, 0x7C00, (raised - _HALF_REBIAS) >> 13)
    # Below 2**-14 a half counts in units of 2**-24; `dropped` bits of the significand lie below.
    exponent = magnitude >> 23
    implicit_bit = (exponent > 0).to(torch.int64) << 23
    dropped = 126 - exponent.clamp(min=1)
    shift = dropped.clamp(0, 31)
    one = torch.ones_like(shift)
    kept = ((magnitude & 0x7FFFFF | implicit_bit) + (random & ((one << shift) - 1))) >> shift
    subnormal = torch.where(dropped <= 31, kept, 0)
    special = torch.where(magnitude > _INFINITE, 0x7E00, 0x7C00)
    rounded = torch.where(magnitude < _HALF_SMALLEST_NORMAL, subnormal, normal)
    return torch.where(magnitude >= _INFINITE, special, rounded) | (bits >> 16 & 0x8000)
