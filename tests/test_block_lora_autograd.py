"""Family block_lora as layers use it: gradients, what is saved, and tracing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from partune import ops
from partune.ops._block_lora_reference import dropout_factors

SCALES = [0.5, 2.0]
DRAWS = {"seed": torch.tensor(5), "step": torch.tensor(2), "layer_id": 3}


@dataclass
class Group:
    """Two frozen linears with adapters, the first with a bias that is trained."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    downs: list[Tensor]
    ups: list[Tensor]
    share: str

    def linear(self, x: Tensor, **options: Any) -> list[Tensor]:
        return ops.block_lora_linear(
            x, self.weights, self.biases, self.downs, self.ups,
            scales=SCALES, share=self.share, **options,
        )  # fmt: skip

    def onto_bases(self, x: Tensor, **options: Any) -> list[Tensor]:
        return ops.block_lora(
            x, self.frozen(x), self.downs, self.ups, scales=SCALES, share=self.share, **options
        )

    def frozen(self, x: Tensor) -> list[Tensor]:
        return [F.linear(x, w, b) for w, b in zip(self.weights, self.biases, strict=True)]

    def plain(self, x: Tensor, factors: Tensor | None = None) -> list[Tensor]:
        """By torch's own operations, as autograd differentiates them."""
        read = x if factors is None else x * factors.to(x.dtype).view(x.shape)
        if self.share == "input":
            read = sum(read.chunk(3, -1))
        outputs = []
        members = zip(self.frozen(x), self.downs, self.ups, SCALES, strict=True)
        for base, down, up, scale in members:
            merged = up.sum(0) if self.share == "rank" else up
            thin = scale * (read.to(down.dtype) @ down.t()) @ merged.t()
            outputs.append(base + thin.to(base.dtype))
        return outputs

    def trained(self) -> list[Tensor]:
        return [*self.downs, *self.ups, *(b for b in self.biases if b is not None)]

    def step(self, function: Any, x: Tensor) -> list[Tensor]:
        """Outputs, then the gradients of the input and of what is trained."""
        leaf = x.detach().requires_grad_()
        outputs = function(leaf)
        loss = sum(output.float().square().sum() for output in outputs)
        return [*(o.detach() for o in outputs), *torch.autograd.grad(loss, [leaf, *self.trained()])]


def group(share: str, dtype: torch.dtype = torch.float64, features: int = 12) -> Group:
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs, ranks = (7, 4), (2, 3)
    downs = [torch.randn(r, features // 3 if share == "input" else features) for r in ranks]
    arms = (3,) if share == "rank" else ()
    ups = [torch.randn(*arms, out, r) for out, r in zip(outs, ranks, strict=True)]
    return Group(
        [torch.randn(out, features).to(dtype) for out in outs],
        [torch.randn(outs[0]).to(dtype).requires_grad_(), None],
        [down.to(wide).requires_grad_() for down in downs],
        [up.to(wide).requires_grad_() for up in ups],
        share,
    )


def tokens(dtype: torch.dtype = torch.float64, *lead: int) -> Tensor:
    return torch.randn(*(lead or (2, 5)), 12, generator=torch.Generator().manual_seed(1)).to(dtype)


both_shares = pytest.mark.parametrize("share", ["input", "rank"])


@both_shares
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients(share: str, dropout: float) -> None:
    layers, x = group(share), tokens()
    factors = dropout_factors(10, 12, dropout, *DRAWS.values()) if dropout else None
    expected = layers.step(lambda x: layers.plain(x, factors), x)
    for function in (layers.linear, layers.onto_bases):
        for inplace in ({}, {"inplace": True}) if function == layers.onto_bases else ({},):
            options = {"dropout": dropout, **DRAWS, **inplace}
            actual = layers.step(lambda x, f=function, o=options: f(x, **o), x)
            torch.testing.assert_close(actual, expected)


@both_shares
def test_sixteen_bit_layers_beside_float32_adapters(share: str) -> None:
    layers, x = group(share, torch.bfloat16), tokens(torch.bfloat16)
    expected = layers.step(layers.plain, x)
    actual = layers.step(layers.linear, x)
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= 0.03 * e.abs().max()  # both round to bfloat16 along the way


@pytest.mark.parametrize(
    "shape", [(12,), (0, 12), (3, 0, 12), (2, 1, 3, 12)], ids=lambda s: "x".join(map(str, s))
)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    layers, x = group("input"), torch.randn(shape, dtype=torch.float64)
    actual, expected = layers.step(layers.linear, x), layers.step(layers.plain, x)
    assert actual[0].shape == (*shape[:-1], 7)
    torch.testing.assert_close(actual, expected)


@both_shares
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_shapes_alone_on_the_meta_device(share: str, dropout: float) -> None:
    def on_meta(values: list[Any]) -> list[Any]:
        return [v if v is None else torch.empty_like(v, device="meta") for v in values]

    real, x = group(share, torch.bfloat16), tokens(torch.bfloat16)
    lists = (real.weights, real.biases, real.downs, real.ups)
    layers = Group(*(on_meta(values) for values in lists), share)
    for trained in layers.trained():
        trained.requires_grad_()
    expected = real.step(real.linear, x)
    actual = layers.step(lambda x: layers.linear(x, dropout=dropout), x.to("meta"))
    assert {a.device.type for a in actual} == {"meta"}
    assert [(a.shape, a.dtype) for a in actual] == [(e.shape, e.dtype) for e in expected]


def test_inputs_with_gaps() -> None:
    layers = group("input")
    for x in (tokens()[..., :6].repeat(1, 1, 4)[..., ::2], tokens().transpose(0, 1)):
        torch.testing.assert_close(layers.step(layers.linear, x), layers.step(layers.plain, x))


def test_only_what_requires_grad_gets_one() -> None:
    layers, x = group("rank"), tokens()
    outputs = layers.linear(x)
    sum(o.sum() for o in outputs).backward()
    assert x.grad is None and all(t.grad is not None for t in layers.trained())
    for tensor in layers.trained():
        tensor.grad = None
        tensor.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    (layers.linear(leaf)[1]).sum().backward()
    reference = x.clone().requires_grad_()
    layers.plain(reference)[1].sum().backward()
    torch.testing.assert_close(leaf.grad, reference.grad)
    assert not layers.linear(x)[0].requires_grad


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_tokens_times_features_the_input_alone_is_saved(
    dtype: torch.dtype, dropout: float
) -> None:
    features, count = 48, 100
    layers = group("input", dtype, features)
    x = torch.randn(count, features).to(dtype).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        outputs = layers.linear(x, dropout=dropout, **DRAWS)
    large = {t.data_ptr() for t in saved if t.dim() > 1 and t.shape[0] >= count}
    hidden = [t for t in saved if t.shape == (count, 5)]
    assert large - {t.data_ptr() for t in hidden} == {x.data_ptr()}
    assert len(hidden) == 1
    frozen = [w.data_ptr() for w in layers.weights]
    assert [t.data_ptr() for t in saved if t.data_ptr() in frozen] == frozen, "no copies of them"
    sum(o.sum() for o in outputs).backward()


def test_dropout_without_a_seed_draws_from_torchs_generator() -> None:
    layers, x = group("input"), tokens()

    def drawn() -> Tensor:
        return layers.linear(x, dropout=0.5)[0].detach()

    torch.manual_seed(1)
    first, second = drawn(), drawn()
    torch.manual_seed(1)
    assert torch.equal(drawn(), first) and not torch.equal(first, second)
    torch.manual_seed(2)
    expected = layers.step(lambda x: layers.linear(x, dropout=0.5), x)
    torch.manual_seed(2)
    again = layers.step(
        lambda x: checkpoint(lambda y: layers.linear(y, dropout=0.5), x, use_reentrant=False), x
    )
    torch.testing.assert_close(again, expected)


@both_shares
def test_compiles_as_one_graph(share: str) -> None:
    layers, x = group(share, torch.float32), tokens(torch.float32)
    options = {"dropout": 0.3, **DRAWS}
    for function in (
        layers.linear,
        lambda x: layers.linear(x, **options),
        lambda x: layers.onto_bases(x, inplace=True),
    ):
        torch._dynamo.reset()
        expected = layers.step(function, x)
        compiled = torch.compile(function, fullgraph=True)
        # in eager mode the frozen products may come from another library
        torch.testing.assert_close(layers.step(compiled, x), expected, rtol=1e-5, atol=1e-5)


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(12, 7).requires_grad_(False)
        self.down = torch.nn.Parameter(torch.randn(2, 4))
        self.up = torch.nn.Parameter(torch.randn(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        adapter = [self.down], [self.up]
        linear = self.linear
        y = ops.block_lora_linear(x, [linear.weight], [linear.bias], *adapter, scales=[0.5])[0]
        return ops.block_lora(x, [y], *adapter, scales=[0.5], inplace=True)[0]


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict: bool) -> None:
    module, x = Module(), tokens(torch.float32)
    program = torch.export.export(module, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled: bool) -> None:
    layers, x = group("input", torch.float32), tokens(torch.float32)
    torch._dynamo.reset()
    function = torch.compile(layers.linear, fullgraph=True) if compiled else layers.linear
    with torch.autocast("cpu", torch.bfloat16):
        expected = layers.step(layers.plain, x)
        actual = layers.step(function, x)  # its backward too is within the region
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    assert actual[0].dtype == torch.bfloat16 and actual[-1].dtype == torch.float32
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= 0.03 * e.abs().max()


def test_in_place_overwrites_the_bases() -> None:
    layers, x = group("input"), tokens()
    bases = [base.detach().clone() for base in layers.frozen(x)]
    outputs = ops.block_lora(x, bases, layers.downs, layers.ups, scales=SCALES, inplace=True)
    assert all(a is b for a, b in zip(outputs, bases, strict=True))
    expected = layers.step(layers.plain, x)[:2]
    torch.testing.assert_close([o.detach() for o in outputs], expected)
    views = [base.view(10, -1) * 1 for base in layers.frozen(x)]
    views = [view.view(2, 5, -1) for view in views]
    outputs = ops.block_lora(x, views, layers.downs, layers.ups, scales=SCALES, inplace=True)
    assert not any(a is b for a, b in zip(outputs, views, strict=True)), "autograd can't follow"
    torch.testing.assert_close([o.detach() for o in outputs], expected)
    (alone,) = ops.block_lora(
        x, views[:1], layers.downs[:1], layers.ups[:1], scales=SCALES[:1], inplace=True
    )
    assert alone is not views[0]
    torch.testing.assert_close(alone.detach(), expected[0])
    kept = [base.detach() for base in layers.frozen(x)]
    before = [base.clone() for base in kept]
    ops.block_lora(x, kept, layers.downs, layers.ups, scales=SCALES)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


def test_gradients_behind_a_base_that_is_a_view() -> None:
    """As wide as the input: autograd would take the input's gradient for the base's."""
    x = tokens().requires_grad_()
    weight = torch.randn(x.shape[-1], x.shape[-1], dtype=x.dtype, requires_grad=True)
    bias = torch.randn(x.shape[-1], dtype=x.dtype)
    down = torch.randn(2, x.shape[-1], dtype=x.dtype, requires_grad=True)
    up = torch.randn(x.shape[-1], 2, dtype=x.dtype, requires_grad=True)

    def gradients(inplace: bool) -> tuple[torch.Tensor, ...]:
        base = torch.nn.functional.linear(x, weight, bias)
        assert base._is_view()
        (output,) = ops.block_lora(x, [base], [down], [up], scales=[1.0], inplace=inplace)
        return torch.autograd.grad(output.square().sum(), (x, weight, down, up))

    for kept, overwritten in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(overwritten, kept)


def test_a_backward_made_stale_raises() -> None:
    layers, x = group("input"), tokens().requires_grad_()
    for change in (x, layers.weights[0], layers.downs[0], layers.ups[1]):
        loss = sum(output.sum() for output in layers.linear(x))
        with torch.no_grad():
            change.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    hidden = layers.downs[0].sum() * torch.ones(10, 7, dtype=torch.float64)
    squared = hidden.square()  # whose backward needs what is overwritten
    adapter = layers.downs[:1], layers.ups[:1]
    ops.block_lora(x.detach().view(10, 12), [hidden], *adapter, scales=[1.0], inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


def test_all_arms_of_a_shared_rank_get_the_same_gradient() -> None:
    layers, x = group("rank"), tokens()
    sum(o.square().sum() for o in layers.linear(x)).backward()
    for up in layers.ups:
        assert up.grad.is_contiguous() and up.grad.abs().max() > 0
        assert torch.equal(up.grad, up.grad[:1].expand_as(up.grad))


def test_a_second_derivative_is_refused() -> None:
    layers, leaf = group("input"), tokens().requires_grad_()
    for function in (layers.linear, layers.onto_bases):
        with pytest.raises(RuntimeError, match="has no second derivative"):
            loss = (function(leaf)[0] * leaf.sum()).sum()
            torch.autograd.grad(loss, leaf, create_graph=True)
