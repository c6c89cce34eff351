"""Family scale_shift: every backend's kernels against the plain-torch reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_emulator
from op_cases import GPU, Backend, assert_close, embed
from partune import _native
from partune.ops._contract import OPS
from scale_shift_cases import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    NORM_SHAPES,
    assert_grads_close,
    assert_sums_close,
    backward_of,
    case,
    check_backward,
    check_forward,
    norm_backward,
    norm_forward,
)

SIXTEEN_BIT = [torch.bfloat16, torch.float16]
MEDIUM = (131, 520) if cuda_emulator.MODE != "tsan" else (35, 131)
PLANES = (2, 5, 9, 11)
on_cpu_and_gpu = pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), LAYOUTS, ids=str)
def test_scale_shift(
    ops: Any, device: torch.device, shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype
) -> None:
    site = case(shape, dtype, channel_dim=channel_dim, device=device)
    for activation in ACTIVATIONS:
        check_forward(ops, site, channel_dim, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), LAYOUTS, ids=str)
def test_scale_shift_backward(
    ops: Any, device: torch.device, shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype
) -> None:
    site = case(shape, dtype, channel_dim=channel_dim, device=device)
    for activation in ACTIVATIONS:
        check_backward(ops, site, channel_dim=channel_dim, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "channel_dim"), [(MEDIUM, -1), (PLANES, 1)], ids=str)
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_gradients_that_are_not_wanted_are_empty(
    ops: Any,
    device: torch.device,
    shape: tuple[int, ...],
    channel_dim: int,
    activation: str,
    wanted: tuple[bool, bool],
) -> None:
    site = case(shape, torch.float32, channel_dim=channel_dim, device=device)
    options = {"activation": activation, "channel_dim": channel_dim}
    whole = backward_of(ops.scale_shift_backward, site, **options)
    part = backward_of(
        ops.scale_shift_backward, site, **options, input_grad=wanted[0], scale_grad=wanted[1]
    )
    for got, full, asked in zip(part, whole, (wanted[0], wanted[1], wanted[1]), strict=True):
        assert torch.equal(got, full) if asked else got.numel() == 0
    if activation == "none" and not wanted[1]:  # then nothing need be saved
        nothing = ops.scale_shift_backward(
            site.grad, None, site.scale, channel_dim=channel_dim,
            input_grad=wanted[0], scale_grad=False,
        )  # fmt: skip
        assert torch.equal(nothing[0], part[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), [(MEDIUM, -1), (PLANES, 1)], ids=str)
def test_the_input_is_told_from_the_output(
    ops: Any, device: torch.device, shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype
) -> None:
    """The sums of what the exact reference makes of the rounded output; and of the true input, as
    far as the output's rounding lets it."""
    site = case(shape, dtype, channel_dim=channel_dim, device=device)
    output = ops.scale_shift(site.input, site.scale, site.shift, channel_dim=channel_dim)
    options = {"channel_dim": channel_dim}
    mine = ops.scale_shift_backward(
        site.grad, output, site.scale, site.shift, from_output=True, **options
    )
    exact = site.double()
    reference = OPS["scale_shift_backward"].reference
    inverted = reference(
        exact.grad, output.double().cpu(), exact.scale, exact.shift, from_output=True, **options
    )
    true = reference(exact.grad, exact.input, exact.scale, exact.shift, **options)
    sizes = reference(exact.grad.abs(), exact.input.abs(), exact.scale, exact.shift, **options)
    assert_grads_close(mine, inverted, sizes, dtype)
    assert_grads_close(mine, true, sizes, dtype)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), [(MEDIUM, -1), (PLANES, 1)], ids=str)
def test_float32_vectors_beside_narrow_inputs(
    ops: Any, device: torch.device, shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype
) -> None:
    site = case(shape, dtype, channel_dim=channel_dim, vectors=torch.float32, device=device)
    check_forward(ops, site, channel_dim, "gelu")
    check_backward(ops, site, channel_dim=channel_dim, activation="gelu")
    grads = backward_of(ops.scale_shift_backward, site, channel_dim=channel_dim)
    assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_shift_in_place(ops: Any, device: torch.device, dtype: torch.dtype) -> None:
    for shape, channel_dim in LAYOUTS:
        site = case(shape, dtype, channel_dim=channel_dim, device=device)
        vectors = site.scale, site.shift, site.bias
        functional = ops.scale_shift(site.input, *vectors, channel_dim=channel_dim)
        assert ops.scale_shift_(site.input, *vectors, channel_dim=channel_dim) is None
        assert torch.equal(site.input, functional)


def test_missing_vectors_are_one_and_zero(ops: Any, device: torch.device) -> None:
    site = case(MEDIUM, torch.float32, device=device)
    zero = torch.zeros_like(site.scale)
    bare = ops.scale_shift(site.input, site.scale, activation="gelu")
    assert torch.equal(bare, ops.scale_shift(site.input, site.scale, zero, zero, activation="gelu"))
    bare = ops.scale_shift_backward(site.grad, site.input, site.scale, activation="gelu")
    full = backward_of(
        ops.scale_shift_backward, site._replace(shift=zero, bias=zero), activation="gelu"
    )
    assert all(torch.equal(a, b) for a, b in zip(bare, full, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_memory_is_taken_as_it_is(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    for shape, memory_format in (
        ((2, 5, 9, 11), torch.channels_last),
        ((2, 3, 4, 5, 6), torch.channels_last_3d),
    ):
        site = case(shape, dtype, channel_dim=1, device=device)
        vectors = site.scale, site.shift, site.bias
        x, grad = (t.contiguous(memory_format=memory_format) for t in (site.input, site.grad))
        y = ops.scale_shift(x, *vectors, channel_dim=1)
        assert y.stride() == x.stride()
        assert torch.equal(y, ops.scale_shift(site.input, *vectors, channel_dim=1))
        check_backward(ops, site._replace(input=x, grad=grad), channel_dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), [((37, 131), -1), ((37, 4, 33), 1)], ids=str)
def test_unaligned_views_with_sentinels(
    ops: Any, device: torch.device, shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype
) -> None:
    plain = case(shape, dtype, channel_dim=channel_dim, device=device)
    expected = backward_of(ops.scale_shift_backward, plain, channel_dim=channel_dim)
    for offset in (1, 2, 3):

        def shifted(value: Tensor, offset: int = offset) -> Tensor:
            return torch.cat([value.new_zeros(offset), value.flatten()])[offset:].view(value.shape)

        viewed = plain._replace(**{k: shifted(v) for k, v in plain._asdict().items()})
        actual = backward_of(ops.scale_shift_backward, viewed, channel_dim=channel_dim)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    matrix = plain.input.reshape(shape[0], -1)
    view, buffer = embed(matrix, "unaligned")
    around = buffer.clone()
    ops.scale_shift_(view.view(shape), plain.scale, plain.shift, channel_dim=channel_dim)
    written = ops.scale_shift(plain.input, plain.scale, plain.shift, channel_dim=channel_dim)
    around.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(
        written.reshape(view.shape)
    )
    assert torch.equal(buffer, around), "something was written outside of the view"


# ---- norms ----


@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norms(
    ops: Any, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, rms: bool
) -> None:
    name = "rms_norm_scale_shift" if rms else "layer_norm_scale_shift"
    op = ops.rms_norm_scale_shift if rms else ops.layer_norm_scale_shift
    site = case(shape, dtype, device=device)
    exact = site.double()
    output, *statistics = norm_forward(op, site, rms=rms)
    reference, *wanted = norm_forward(OPS[name].reference, exact, rms=rms)
    assert_close(output, reference.to(dtype))
    for mine, theirs in zip(statistics, wanted, strict=True):
        assert_close(mine, theirs.to(mine.dtype))

    op = ops.rms_norm_scale_shift_backward if rms else ops.layer_norm_scale_shift_backward
    reference = OPS[f"{name}_backward"].reference
    grads = norm_backward(op, site, statistics, rms=rms)
    theirs = norm_backward(reference, exact, wanted, rms=rms)
    sizes = norm_backward(reference, exact._replace(grad=exact.grad.abs()), wanted, rms=rms)
    # |x̂| < sqrt(columns), so this bounds the terms of scale's gradient.
    reach = (math.sqrt(shape[-1]) * exact.weight.abs() + exact.bias.abs()) * sizes[2]
    # A difference: what is left of its terms may be little.
    terms = exact.grad * exact.scale * exact.weight * wanted[-1].unsqueeze(-1)
    assert_sums_close(grads[0], theirs[0], terms.abs().amax(-1, keepdim=True))
    assert_sums_close(grads[1], theirs[1], reach)
    assert_sums_close(grads[2], theirs[2], sizes[2])
    for input_grad, scale_grad in ((True, False), (False, True)):
        part = norm_backward(
            op, site, statistics, rms=rms, input_grad=input_grad, scale_grad=scale_grad
        )
        wanted_parts = (input_grad, scale_grad, scale_grad)
        for got, full, asked in zip(part, grads, wanted_parts, strict=True):
            assert torch.equal(got, full) if asked else got.numel() == 0


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_norms_without_vectors_and_with_float32_ones(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    site = case((40, 129), dtype, vectors=torch.float32, device=device)
    exact = site.double()
    output, *statistics = ops.layer_norm_scale_shift(site.input, None, None, site.scale, eps=1e-5)
    reference = OPS["layer_norm_scale_shift"].reference(
        exact.input, None, None, exact.scale, eps=1e-5
    )
    assert_close(output, reference[0].to(dtype))
    grads = ops.layer_norm_scale_shift_backward(
        site.grad, site.input, *statistics, None, None, site.scale
    )
    theirs = OPS["layer_norm_scale_shift_backward"].reference(
        exact.grad, exact.input, *reference[1:], None, None, exact.scale
    )
    assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]
    for mine, wanted in zip(grads, theirs, strict=True):
        assert_close(mine, wanted.to(mine.dtype))


def test_a_variance_of_large_means_is_exact_enough(ops: Any, device: torch.device) -> None:
    """Two passes: E[x²] - E[x]² would lose every digit here."""
    site = case((9, 300), torch.float32, device=device)
    site = site._replace(input=site.input + 1000)
    exact = site.double()
    output = norm_forward(ops.layer_norm_scale_shift, site, rms=False)[0]
    reference = norm_forward(OPS["layer_norm_scale_shift"].reference, exact, rms=False)[0]
    # The mean is rounded to 6e-5: a part of the spread, which is 1.
    assert_close(output, reference.float(), 1e-4)


# ---- the arithmetic ----


def test_gelu_to_a_few_units_in_the_last_place(ops: Any, device: torch.device) -> None:
    """Against float64: 6 units for the exact form (13 without fused multiply-adds) down to z = -5
    and 1e-6 relative below; the tanh form's argument is rounded, which its lower tail shows."""
    z = torch.linspace(-12, 12, 4097 if cuda_emulator.MODE != "tsan" else 257)
    one = torch.ones(1)
    fuses = _native.require().cpu_isa() != "baseline"
    for activation, limit in (("gelu", 6 if fuses else 13), ("gelu_tanh", 60)):
        exact = OPS["scale_shift"].reference(
            z.double().unsqueeze(1), one.double(), activation=activation
        )
        if activation == "gelu":
            exact = (z.double() * torch.erfc(-z.double() / math.sqrt(2)) / 2).unsqueeze(1)
        mine = ops.scale_shift(z.unsqueeze(1).to(device), one.to(device), activation=activation)
        error = (mine.cpu().double() - exact).abs() / exact.abs().clamp_min(1e-30)
        assert error[z.abs() <= 5].max() <= limit * 2.0**-24


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_narrow_results_are_rounded_to_nearest(backend: Backend, dtype: torch.dtype) -> None:
    """Ties to even, subnormals, overflow and every NaN: all 65,536 inputs, times float32 scales."""
    ops, device = backend.ops, backend.device
    step = 97 if backend.name == "cuda-emulated" else 1
    x = torch.arange(0, 2**16, step, dtype=torch.int32).to(torch.int16).view(dtype).repeat(3, 1)
    scale = torch.tensor([1.0, 1 + 2.0**-8, 1.37], dtype=torch.float32)
    y = ops.scale_shift(x.t().contiguous().to(device), scale.to(device)).t().cpu()
    torch.testing.assert_close(
        y, (x.float() * scale.unsqueeze(1)).to(dtype), rtol=0, atol=0, equal_nan=True
    )
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # CUDA's own first
    assert ops.scale_shift(x[0, :64].view(32, 2).to(device), nan.to(device)).isnan().all()


def test_nan_and_inf_stay_in_their_channels(ops: Any, device: torch.device) -> None:
    site = case((40, 33), torch.float32, device=device)
    clean = backward_of(ops.scale_shift_backward, site)
    site.grad[3, 5] = float("nan")
    site.input[4, 6] = float("inf")
    spoiled = backward_of(ops.scale_shift_backward, site)
    assert spoiled[0][3, 5].isnan() and spoiled[1][5].isnan() and spoiled[2][5].isnan()
    assert spoiled[1][6].isinf()
    for a, b in zip(spoiled, clean, strict=True):
        a[..., 5:7] = b[..., 5:7]
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(ops: Any, dtype: torch.dtype) -> None:
    rows, planes = case((1000, 300), dtype), case((3, 7, 100, 90), dtype, channel_dim=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            normed = norm_forward(ops.layer_norm_scale_shift, rows, rms=False)
            results.append([
                *backward_of(ops.scale_shift_backward, rows),
                *backward_of(ops.scale_shift_backward, planes, channel_dim=1, activation="gelu"),
                *normed,
                *norm_backward(
                    ops.layer_norm_scale_shift_backward, rows, normed[1:], rms=False
                ),
            ])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cuda-emulated", GPU], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements_have_the_bits_of_the_cpu(backend: Backend, dtype: torch.dtype) -> None:
    """All that is no sum: outputs and the input's gradient."""
    if _native.require().cpu_isa() == "baseline":
        return  # rounds multiply-adds twice
    for shape, channel_dim in LAYOUTS:
        site = case(shape, dtype, channel_dim=channel_dim)
        there = site._replace(**{k: v.to(backend.device) for k, v in site._asdict().items()})
        for activation in ACTIVATIONS:
            options = {"activation": activation, "channel_dim": channel_dim}
            results = [
                (
                    ops.scale_shift(s.input, s.scale, s.shift, s.bias, **options).cpu(),
                    backward_of(ops.scale_shift_backward, s, **options)[0].cpu(),
                )
                for ops, s in ((backend.ops, there), (torch.ops.partune, site))
            ]
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_beyond_the_caches_are_the_same(ops: Any, dtype: torch.dtype) -> None:
    """Large results are written around the caches, by vectors that their addresses need not fit."""
    rows, columns = (3001, 3001) if dtype == torch.float32 else (4201, 4201)
    large = case((rows, columns), dtype)
    for first in (0, 1):
        view = large.input.view(-1)[first : first + (rows - 1) * columns].view(rows - 1, columns)
        whole = ops.scale_shift(view, large.scale, large.shift)
        parts = [ops.scale_shift(part, large.scale, large.shift) for part in view.split(500)]
        assert torch.equal(whole, torch.cat(parts))
        ops.scale_shift_(view, large.scale, large.shift)
        assert torch.equal(whole, view)
    site = large._replace(grad=large.grad)
    whole = backward_of(ops.scale_shift_backward, site)[0]
    parts = [
        backward_of(ops.scale_shift_backward, site._replace(grad=g, input=x))[0]
        for g, x in zip(site.grad.split(500), site.input.split(500), strict=True)
    ]
    assert torch.equal(whole, torch.cat(parts))
    whole, *statistics = norm_forward(ops.rms_norm_scale_shift, site, rms=True)
    parts = [
        norm_forward(ops.rms_norm_scale_shift, site._replace(input=part), rms=True)[0]
        for part in site.input.split(500)
    ]
    assert torch.equal(whole, torch.cat(parts))
    whole = norm_backward(ops.rms_norm_scale_shift_backward, site, statistics, rms=True)[0]
    part = site._replace(grad=site.grad[:500], input=site.input[:500])
    head = norm_backward(ops.rms_norm_scale_shift_backward, part, [statistics[0][:500]], rms=True)[
        0
    ]
    assert torch.equal(whole[:500], head)


@on_cpu_and_gpu
def test_opcheck(ops: Any, device: torch.device) -> None:
    opcheck = torch.library.opcheck
    site = case((5, 7), torch.float32, device=device)
    x, *pair, bias = (
        value.clone().requires_grad_() for value in (site.input, site.scale, site.shift, site.bias)
    )
    for activation in ACTIVATIONS:
        opcheck(ops.scale_shift.default, (x, *pair, bias), {"activation": activation})
    opcheck(ops.scale_shift.default, (x, pair[0]))
    opcheck(ops.scale_shift_.default, (site.input, site.scale, site.shift))
    saved = site.grad, site.input, site.scale, site.shift
    opcheck(ops.scale_shift_backward.default, saved)
    opcheck(ops.scale_shift_backward.default, saved, {"input_grad": False})
    eps = {"eps": 1e-5}
    opcheck(ops.layer_norm_scale_shift.default, (x, None, None, *pair), eps)
    opcheck(ops.rms_norm_scale_shift.default, (x, None, *pair), eps)
    rows = [torch.ones(5, device=device)]
    normed = site.grad, site.input, *rows
    vectors = None, site.bias, site.scale
    opcheck(ops.layer_norm_scale_shift_backward.default, (*normed, *rows, *vectors))
    opcheck(ops.rms_norm_scale_shift_backward.default, (*normed, None, site.scale))


def test_rms_norm_is_layer_norm_without_the_mean(ops: Any, device: torch.device) -> None:
    """Of rows whose mean is zero, but for the part of their gradient along the mean."""
    site = case((8, 64), torch.float64, device=device)
    x = site.input - site.input.mean(-1, keepdim=True)
    rms, rstd = ops.rms_norm_scale_shift(x, None, site.scale, eps=1e-5)
    layer, mean, same_rstd = ops.layer_norm_scale_shift(x, None, None, site.scale, eps=1e-5)
    torch.testing.assert_close(rms, layer)
    torch.testing.assert_close(rstd, same_rstd)
    vectors = None, site.scale
    ours = ops.rms_norm_scale_shift_backward(site.grad, x, rstd, *vectors)
    theirs = ops.layer_norm_scale_shift_backward(site.grad, x, mean, rstd, None, *vectors)
    torch.testing.assert_close(ours[0] - ours[0].mean(-1, keepdim=True), theirs[0])
    torch.testing.assert_close(ours[1:], theirs[1:])
