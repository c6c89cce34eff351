"""Inputs for the tests of family scale_shift, and the ops' references on them in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import cuda_emulator
from op_cases import CPU, assert_close
from partune.ops._contract import OPS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["none", "gelu", "gelu_tanh"]
# By channel_dim. Rows of channels: odd sizes, more rows than a block, more channels than a tile; a
# whole CUDA tile, and a whole segment of a channel's neighbours.
LAYOUTS: list[tuple[tuple[int, ...], int]] = [
    ((0, 5), -1), ((3, 0), -1), ((1, 1), -1), ((7,), -1), ((63, 129), -1), ((1, 5000), -1),
    ((1000, 3), -1), ((2, 5, 300), -1), ((131, 520), -1), ((4, 6), 1), ((2, 3, 7), 1),
    ((0, 3, 4), 1), ((2, 3, 0), 1), ((2, 5, 9, 11), 1), ((1, 3, 100, 101), 1), ((2, 130, 1, 1), 1),
    ((33, 256), -1), ((2, 1, 64, 64), 1),
]  # fmt: skip
NORM_SHAPES: list[tuple[int, ...]] = [
    (0, 5), (1, 1), (7,), (63, 129), (1, 5000), (1000, 3), (2, 5, 300), (3, 6000)
]  # fmt: skip
if cuda_emulator.MODE == "tsan":  # which takes twenty times as long
    LAYOUTS = [
        ((0, 5), -1), ((3, 0), -1), ((1, 1), -1), ((7,), -1), ((35, 131), -1), ((40, 3), -1),
        ((4, 6), 1), ((2, 3, 7), 1), ((2, 5, 9, 11), 1), ((1, 2, 50, 101), 1),
    ]  # fmt: skip
    NORM_SHAPES = [(0, 5), (1, 1), (7,), (9, 129), (1, 1100), (20, 3)]


class Case(NamedTuple):
    """The tensors of a site; of a norm, weight too."""

    input: Tensor
    grad: Tensor
    scale: Tensor
    shift: Tensor
    bias: Tensor
    weight: Tensor

    def double(self) -> Case:
        return Case(*(value.double().cpu() for value in self))


def case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    channel_dim: int = -1,
    vectors: torch.dtype | None = None,
    device: torch.device = CPU,
    seed: int = 0,
) -> Case:
    """A site whose scale is well away from zero; its vectors may have another dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, mean: float = 0.0, spread: float = 1.0) -> Tensor:
        return mean + spread * torch.randn(*size, generator=generator, dtype=torch.float64)

    channels = shape[channel_dim]
    signs = 1 - 2 * (torch.arange(channels) % 2)
    tensors = draw(*shape), draw(*shape)
    scale = draw(channels, mean=1.0, spread=0.1) * signs
    rest = draw(channels, spread=0.3), draw(channels, spread=0.3), draw(channels, mean=1.0)
    return Case(
        *(value.to(device, dtype) for value in tensors),
        *(value.to(device, vectors or dtype) for value in (scale, *rest)),
    )


def assert_sums_close(actual: Tensor, reference: Tensor, terms: Tensor) -> None:
    """Sums over many terms: DESIGN's tolerance of Σ|terms|, `terms` being that, per channel."""
    assert actual.shape == reference.shape
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
    error = (actual.double().cpu() - reference).abs()
    assert (error <= limit[actual.dtype] * terms.clamp_min(1e-30)).all(), error.max()


def assert_grads_close(actual: Any, exact: Any, terms: Any, dtype: torch.dtype) -> None:
    """(input's, scale's, shift's) against the same in float64, empty where not wanted."""
    assert_close(actual[0], exact[0].to(dtype))
    for mine, theirs, size in zip(actual[1:], exact[1:], terms[1:], strict=True):
        assert_sums_close(mine, theirs, size)


def check_forward(ops: Any, site: Case, channel_dim: int, activation: str) -> None:
    actual = ops.scale_shift(
        site.input, site.scale, site.shift, site.bias,
        activation=activation, channel_dim=channel_dim,
    )  # fmt: skip
    exact = site.double()
    reference = OPS["scale_shift"].reference(
        exact.input, exact.scale, exact.shift, exact.bias,
        activation=activation, channel_dim=channel_dim,
    )  # fmt: skip
    assert_close(actual, reference.to(actual.dtype))


def backward_of(op: Any, site: Case, **options: Any) -> Any:
    return op(site.grad, site.input, site.scale, site.shift, site.bias, **options)


def check_backward(ops: Any, site: Case, **options: Any) -> None:
    """From the saved input, each wanted gradient."""
    exact, reference = site.double(), OPS["scale_shift_backward"].reference
    theirs = backward_of(reference, exact, **options)
    # Σ|terms|: of a sum of products the products of the absolute values bound it.
    sizes = backward_of(
        reference,
        exact._replace(grad=exact.grad.abs(), input=exact.input.abs(), bias=exact.bias.abs()),
        **{**options, "activation": "none"},
    )
    mine = backward_of(ops.scale_shift_backward, site, **options)
    sizes = [sizes[0], *(2 * size for size in sizes[1:])]  # |gelu'| < 1.13
    assert_grads_close(mine, theirs, sizes, site.input.dtype)


def norm_forward(op: Any, site: Case, *, rms: bool) -> Any:
    if rms:
        return op(site.input, site.weight, site.scale, site.shift, eps=1e-5)
    return op(site.input, site.weight, site.bias, site.scale, site.shift, eps=1e-5)


def norm_backward(op: Any, site: Case, statistics: Any, *, rms: bool, **wanted: bool) -> Any:
    if rms:
        return op(site.grad, site.input, *statistics, site.weight, site.scale, **wanted)
    return op(site.grad, site.input, *statistics, site.weight, site.bias, site.scale, **wanted)
