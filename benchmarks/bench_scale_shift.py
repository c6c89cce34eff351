"""Family scale_shift, forward and backward together, beside torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conftest import SHARE_OF_BAR, Comparison, copy_bandwidth
from partune import ops

SCALE_SHIFT = torch.ops.partune.scale_shift.default
SCALE_SHIFT_ = torch.ops.partune.scale_shift_.default
SCALE_SHIFT_BACKWARD = torch.ops.partune.scale_shift_backward.default
LAYER_NORM = torch.ops.partune.layer_norm_scale_shift.default
LAYER_NORM_BACKWARD = torch.ops.partune.layer_norm_scale_shift_backward.default
RMS_NORM = torch.ops.partune.rms_norm_scale_shift.default
RMS_NORM_BACKWARD = torch.ops.partune.rms_norm_scale_shift_backward.default
SHAPES = [(3152, 768), (3152, 3072), (4096, 4096)]  # ViT-B/16's norms and fc1 at a batch of 16
DTYPES = [torch.float32, torch.bfloat16]
EAGER, COMPILED = "torch eager", "torch.compile"


class Handed(torch.autograd.Function):
    """What a layer before would hand on: no leaf, so that it can be overwritten."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def plain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale + shift


def with_gelu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.gelu(x * scale + shift)


class Site:
    """A site's tensors, and a training step's forward and backward through a function of them."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        channels = shape[1]
        self.x = draw(*shape).to(dtype).requires_grad_()
        self.grad = draw(*shape).to(dtype)
        self.scale = (1 + 0.02 * draw(channels)).to(dtype).requires_grad_()
        self.shift = (0.02 * draw(channels)).to(dtype).requires_grad_()
        self.weight = (1 + 0.1 * draw(channels)).to(dtype)
        self.bias = (0.1 * draw(channels)).to(dtype)

    def layer_norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, 1e-6) * scale + shift

    def rms_norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6) * scale + shift

    def step(self, function: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> object:
            y = function(Handed.apply(self.x), self.scale, self.shift)
            return torch.autograd.grad(y, (self.x, self.scale, self.shift), self.grad)

        return run

    def compare(
        self, ours: Callable[..., Tensor], torchs: Callable[..., Tensor], rounds: int = 21
    ) -> Comparison:
        torch._dynamo.reset()
        compiled = torch.compile(torchs, fullgraph=True, dynamic=False)
        functions = {
            "ours": self.step(ours),
            EAGER: self.step(torchs),
            COMPILED: self.step(compiled),
            "copy": copy_bandwidth(),
        }
        return Comparison(functions, rounds)

    def bytes_moved(self) -> int:
        """Input and output; then gradient, what was saved, and the input's gradient."""
        return 5 * self.x.nbytes


def bars(eager: float, compiled: float) -> dict[str, float]:
    return {EAGER: eager * SHARE_OF_BAR, COMPILED: compiled * SHARE_OF_BAR}


on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@on_shapes
@on_dtypes
def test_scale_shift(report, shape, dtype) -> None:
    site = Site(shape, dtype)
    report(site.compare(ops.scale_shift, plain), bars(2, 1.2), site.bytes_moved())


@on_shapes
@on_dtypes
def test_scale_shift_in_place(report, shape, dtype) -> None:
    site = Site(shape, dtype)
    comparison = site.compare(lambda *a: ops.scale_shift(*a, inplace=True), plain)
    report(comparison, bars(3, 1.8), site.bytes_moved())


@on_shapes
@on_dtypes
def test_scale_shift_gelu(report, shape, dtype) -> None:
    site = Site(shape, dtype)
    comparison = site.compare(lambda *a: ops.scale_shift(*a, activation="gelu"), with_gelu)
    report(comparison, bars(2, 1.2), site.bytes_moved())


@on_shapes
@on_dtypes
def test_layer_norm_scale_shift(report, shape, dtype) -> None:
    site = Site(shape, dtype)

    def ours(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.layer_norm_scale_shift(x, site.weight, site.bias, scale, shift, eps=1e-6)

    report(site.compare(ours, site.layer_norm), bars(2, 1.2), site.bytes_moved())


@on_dtypes
def test_rms_norm_scale_shift(report, dtype) -> None:
    site = Site(SHAPES[0], dtype)

    def ours(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.rms_norm_scale_shift(x, site.weight, scale, shift, eps=1e-6)

    report(site.compare(ours, site.rms_norm), bars(2, 1.2), site.bytes_moved())


@on_dtypes
def test_ops_alone(report, dtype) -> None:
    """Without autograd, in turn, beside as many copies of as many bytes."""
    site = Site(SHAPES[2], dtype)
    x, scale, shift, grad = site.x.detach(), site.scale.detach(), site.shift.detach(), site.grad
    target = torch.empty_like(x)
    vectors = site.weight, site.bias, scale
    normed, mean, rstd = LAYER_NORM(x, *vectors, shift, eps=1e-6)
    rms = RMS_NORM(x, site.weight, scale, shift, eps=1e-6)[1]

    def ours() -> None:
        SCALE_SHIFT(x, scale, shift)
        SCALE_SHIFT_(target, scale, shift)
        SCALE_SHIFT_BACKWARD(grad, x, scale, shift)
        LAYER_NORM_BACKWARD(grad, x, mean, rstd, *vectors)
        RMS_NORM_BACKWARD(grad, x, rms, site.weight, scale)

    def copies() -> None:
        for _ in range(7):
            target.copy_(normed)

    functions = {"ours": ours, "copies": copies, "copy": copy_bandwidth()}
    # Copies into memory that is there; ours pays for new memory of its results.
    report(
        Comparison(functions, rounds=7), {"copies": 0.25 * SHARE_OF_BAR}, (2 + 2 + 3 * 3) * x.nbytes
    )
