"""Family scale_shift through autograd, torch.compile and torch.export: the public functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from partune import ops
from partune.ops._scale_shift_autograd import LARGEST_RATIO, is_invertible
from scale_shift_cases import ACTIVATIONS, case

gradcheck = torch.autograd.gradcheck


def leaves(*shape: int, channels: int, seed: int = 0) -> list[Tensor]:
    """Input, scale away from zero, shift, bias and weight, float64 leaves."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [shape, *[(channels,)] * 4]
    values = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]
    values[1] = 1 + 0.2 * values[1]
    return [value.requires_grad_() for value in values]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "channel_dim"), [((3, 4, 5), -1), ((2, 5, 3, 2), 1)], ids=str)
def test_gradcheck(shape: tuple[int, ...], channel_dim: int, activation: str) -> None:
    x, scale, shift, bias, _ = leaves(*shape, channels=5)
    options = {"activation": activation, "channel_dim": channel_dim}

    def with_bias(x: Tensor, scale: Tensor, shift: Tensor, bias: Tensor) -> Tensor:
        return ops.scale_shift(x, scale, shift, bias=bias, **options)

    assert gradcheck(with_bias, (x, scale, shift, bias))
    assert gradcheck(lambda x, scale: ops.scale_shift(x, scale, **options), (x, scale))
    assert gradcheck(lambda x: ops.scale_shift(x, scale.detach(), **options), (x,))
    frozen = x.detach()
    assert gradcheck(lambda *v: ops.scale_shift(frozen, *v, **options), (scale, shift))
    transposed = x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    assert gradcheck(lambda x: ops.scale_shift(x, scale, **options), (transposed,))


def test_gradcheck_in_place() -> None:
    x, scale, shift, bias, _ = leaves(3, 5, channels=5)
    for values in ((x, scale, shift), (x, scale)):
        assert gradcheck(lambda x, *v: ops.scale_shift(x * 1, *v, inplace=True), values)

    def with_bias(x: Tensor, *vectors: Tensor) -> Tensor:
        return ops.scale_shift(x * 1, *vectors[:2], bias=vectors[2], inplace=True)

    assert gradcheck(with_bias, (x, scale, shift, bias))


def test_gradcheck_where_the_input_is_kept() -> None:
    x, _, shift, _, _ = leaves(3, 5, channels=5)
    zero = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    for inplace in (False, True):
        assert gradcheck(
            lambda x, *v, inplace=inplace: ops.scale_shift(x * 1, *v, inplace=inplace),
            (x, zero, shift),
        )


def test_gradcheck_of_norms() -> None:
    x, scale, shift, bias, weight = leaves(3, 5, channels=5)

    def layer_norm(*v: Tensor) -> Tensor:
        return ops.layer_norm_scale_shift(*v, eps=1e-5)

    def rms_norm(*v: Tensor) -> Tensor:
        return ops.rms_norm_scale_shift(*v, eps=1e-5)

    assert gradcheck(layer_norm, (x, weight, bias, scale, shift))
    assert gradcheck(layer_norm, (x, weight.detach(), bias.detach(), scale, shift))
    assert gradcheck(lambda x, scale: layer_norm(x, None, None, scale), (x, scale))
    assert gradcheck(lambda bias: layer_norm(x.detach(), None, bias, scale.detach()), (bias,))
    assert gradcheck(rms_norm, (x, weight, scale, shift))
    assert gradcheck(lambda *v: rms_norm(x.detach(), weight.detach(), *v), (scale, shift))


def test_the_registered_ops_have_the_gradients_of_the_functions() -> None:
    """Tracers and the dispatcher take what is registered; the public functions go around it."""
    site = case((4, 3), torch.float32)
    x, scale, shift = (v.requires_grad_() for v in (site.input, site.scale, site.shift))
    registered = torch.ops.partune
    for direct, public in (
        (registered.scale_shift(x, scale, shift), ops.scale_shift(x, scale, shift)),
        (
            registered.layer_norm_scale_shift(x, None, None, scale, shift, eps=1.0)[0],
            ops.layer_norm_scale_shift(x, None, None, scale, shift, eps=1.0),
        ),
        (
            registered.rms_norm_scale_shift(x, None, scale, shift, eps=1.0)[0],
            ops.rms_norm_scale_shift(x, None, scale, shift, eps=1.0),
        ),
    ):
        assert torch.equal(direct, public)
        grads = [torch.autograd.grad(y, (x, scale, shift), site.grad) for y in (direct, public)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def saved_by(output: Tensor) -> list[Tensor | None]:
    return list(output.grad_fn.saved_tensors)


def test_a_plain_site_saves_its_output_alone() -> None:
    site = case((4, 3), torch.float32)
    x, scale = site.input.requires_grad_(), site.scale.requires_grad_()
    before = ops.kept_inputs()
    y = ops.scale_shift(x, scale, site.shift)
    assert saved_by(y)[0].data_ptr() == y.data_ptr()
    assert ops.kept_inputs() == before
    gelu = ops.scale_shift(x, scale, site.shift, activation="gelu")
    assert saved_by(gelu)[0].data_ptr() == x.data_ptr()
    frozen = ops.scale_shift(x, scale.detach(), site.shift)
    assert saved_by(frozen)[0] is None
    assert ops.kept_inputs() == before


def test_a_scale_that_becomes_too_small_keeps_the_input() -> None:
    """Also when it does so between two calls: the answer is kept by version."""
    site = case((4, 3), torch.float32)
    x, scale = site.input.requires_grad_(), site.scale.requires_grad_()
    ops.scale_shift(x, scale, site.shift)
    before = ops.kept_inputs()
    with torch.no_grad():
        scale[1] = 0
    y = ops.scale_shift(x, scale, site.shift)
    assert saved_by(y)[0].data_ptr() == x.data_ptr()
    assert ops.kept_inputs() == before + 1
    y.sum().backward()
    torch.testing.assert_close(scale.grad, x.detach().sum(0))


@pytest.mark.parametrize("dtype", LARGEST_RATIO, ids=str)
def test_the_bound_on_scale(dtype: torch.dtype) -> None:
    """At the bound the sums still keep the tolerance of their dtype, for inputs of unit size."""
    ratio = LARGEST_RATIO[dtype]
    scale, shift = torch.full((8,), 0.5, dtype=dtype), torch.full((8,), 0.5 * ratio, dtype=dtype)
    assert is_invertible(scale, shift, dtype)
    assert not is_invertible(scale, 1.125 * shift, dtype)
    for bad in (0.0, 2.0**-13, float("nan"), float("inf")):
        assert not is_invertible(torch.full((8,), bad, dtype=dtype), None, dtype)
    assert is_invertible(torch.full((8,), 2.0**-12, dtype=dtype), None, dtype)
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.ops.partune.scale_shift(x, scale, shift)
    backward = torch.ops.partune.scale_shift_backward
    mine = backward(grad, y, scale, shift, from_output=True)[1].double()
    exact = (grad.double() * x.double()).sum(0)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3}
    limit = tolerance.get(dtype, 1e-2) * (grad.double() * x.double()).abs().sum(0)
    assert ((mine - exact).abs() <= limit).all()


def test_in_place_overwrites_and_returns_the_input() -> None:
    site = case((4, 3), torch.float32)
    expected = ops.scale_shift(site.input, site.scale, site.shift)
    x = site.input.clone()
    assert ops.scale_shift(x, site.scale, site.shift, inplace=True) is x
    assert torch.equal(x, expected)
    scale = site.scale.clone().requires_grad_()
    hidden = site.input * 1
    y = ops.scale_shift(hidden, scale, site.shift, inplace=True)
    assert y is hidden and torch.equal(y, expected)
    y.backward(site.grad)
    torch.testing.assert_close(scale.grad, (site.grad * site.input).sum(0))


def test_a_backward_made_stale_raises() -> None:
    site = case((4, 3), torch.float32)
    scale = site.scale.requires_grad_()
    for inplace in (False, True):
        y = ops.scale_shift(site.input * 1, scale, site.shift, inplace=inplace)
        loss = y.sum()
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    squared = (hidden := scale * site.input).square()  # whose backward needs what is overwritten
    ops.scale_shift(hidden, scale, site.shift, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "gelu"}, "inplace: got True with activation 'gelu', want False"),
        ({"input": torch.ones(2, 3, requires_grad=True)}, "inplace: got True for a leaf"),
        ({"input": torch.ones(3, 2).t()}, "input: got strides"),
        ({"channel_dim": 0}, "channel_dim: got 0, want -1"),
    ],
)
def test_what_in_place_refuses(arguments: dict[str, Any], message: str) -> None:
    good = {"input": torch.ones(2, 3), "scale": torch.ones(3), "inplace": True}
    ops.scale_shift(**good)
    with pytest.raises(ValueError, match=message):
        ops.scale_shift(**{**good, **arguments})


def test_a_second_derivative_is_refused() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    scale = torch.ones(3, requires_grad=True)
    for y in (
        ops.scale_shift(x, scale),
        ops.layer_norm_scale_shift(x, None, None, scale, eps=1.0),
        ops.rms_norm_scale_shift(x, None, scale, eps=1.0),
    ):
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad((y * x).sum(), x, create_graph=True)


class Sites(torch.nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(1 + 0.1 * torch.randn(5))
        self.shift = torch.nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        pair = self.scale, self.shift
        y = ops.scale_shift(torch.relu(x) * 2, *pair, inplace=True).sin()
        y = y + ops.scale_shift(x, *pair, activation="gelu", bias=self.shift)
        y = y + ops.scale_shift(x.t(), self.shift[:3], channel_dim=1).t()
        y = y + ops.rms_norm_scale_shift(x, None, *pair, eps=1e-5)
        return y + ops.layer_norm_scale_shift(x, *pair, *pair, eps=1e-5)


@pytest.fixture
def sites() -> tuple[Sites, Tensor]:
    torch.manual_seed(0)
    return Sites(), torch.randn(3, 5)


def test_compiles_as_one_graph(sites: tuple[Sites, Tensor]) -> None:
    model, x = sites
    expected, *grads = gradients(model, model, x)
    before = ops.kept_inputs()
    compiled, *compiled_grads = gradients(torch.compile(model, fullgraph=True), model, x)
    assert ops.kept_inputs() == before
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(compiled_grads, grads)


def gradients(function: Any, model: Sites, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, model.scale.grad.clone(), model.shift.grad.clone()]


@pytest.mark.parametrize("strict", [False, True])
def test_exports(sites: tuple[Sites, Tensor], strict: bool) -> None:
    model, x = sites
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))
