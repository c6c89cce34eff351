"""Family block_lora: every backend's kernels against the plain-torch reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import cuda_emulator
from bad_inputs import BAD_INPUTS, good
from block_lora_cases import (
    DTYPES,
    SHAPES,
    SHARES,
    case,
    check_backward,
    check_forward,
    on_cpu,
)
from op_cases import GPU, Backend, embed
from partune.ops._block_lora_reference import dropout_factors
from partune.ops._contract import OPS

MEDIUM = (65, 34, [(67, 18), (4, 3)], 2) if cuda_emulator.MODE == "tsan" else SHAPES[6]
SMALL = (7, 12, [(7, 4), (4, 6)], 3)
on_cpu_and_gpu = pytest.mark.parametrize("backend", ["cpu", GPU], indirect=True)


@pytest.fixture(autouse=True)
def emulated_gpu(backend: Backend) -> Iterator[None]:
    """One whose tensor cores know bfloat16."""
    emulated = backend.name == "cuda-emulated"
    with cuda_emulator.arch(80) if emulated else contextlib.nullcontext():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_lora(
    ops: Any, device: torch.device, shape: Any, share: str, dtype: torch.dtype
) -> None:
    tested = case(shape, dtype, share=share, device=device)
    hidden = check_forward(ops, tested)
    check_backward(ops, tested, hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", SHARES)
def test_dropout(ops: Any, device: torch.device, share: str, dtype: torch.dtype) -> None:
    for shape in (SMALL, (1, 1, [(1, 1)], 1), MEDIUM):
        tested = case(shape, dtype, share=share, dropout=0.3, device=device)
        check_backward(ops, tested, check_forward(ops, tested))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_more_ranks_than_are_multiplied_in_pairs(ops: Any) -> None:
    for ranks in (64, 65):
        tested = case((50, 40, [(70, ranks)], 1), torch.bfloat16)
        check_backward(ops, tested, check_forward(ops, tested))


@pytest.mark.parametrize("backend", ["cuda-emulated", GPU], indirect=True)
def test_blocks_of_several_tiles_of_tokens(ops: Any, device: torch.device) -> None:
    """The least of which a block reads two tiles, one after the other."""
    check_forward(ops, case((64, 64 * 512, [(1, 1)], 1), torch.float64, device=device))


@pytest.mark.parametrize("backend", ["cuda-emulated"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_tensor_cores_for_bfloat16(ops: Any, dtype: torch.dtype) -> None:
    tested = case(SMALL, dtype)
    with cuda_emulator.arch(75):
        check_backward(ops, tested, check_forward(ops, tested))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "wanted",
    [(True, False, False), (False, True, False), (False, False, True), (True, True, False)],
    ids=str,
)
def test_gradients_that_are_wanted(
    ops: Any, device: torch.device, wanted: tuple[bool, bool, bool], dropout: float
) -> None:
    tested = case(MEDIUM, torch.float32, dropout=dropout, device=device)
    hidden = check_forward(ops, tested)
    for accumulate in (True, False):
        check_backward(ops, tested, hidden, wanted=wanted, accumulate=accumulate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_input_gradient_is_overwritten(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    for share in SHARES:
        tested = case(MEDIUM, dtype, share=share, device=device)
        check_backward(ops, tested, check_forward(ops, tested), accumulate=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dropped_gradient_keeps_its_sign(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    """As torch's dropout leaves negative zeros."""
    tested = case(SMALL, dtype, dropout=0.3, device=device)
    _, hidden = tested.forward(ops.block_lora_)
    mine, _, _ = tested.backward(ops.block_lora_backward_, hidden, accumulate=False)
    exact = replace(tested.exact(), options=on_cpu(tested.options))
    reference = OPS["block_lora_backward_"].reference
    theirs, _, _ = exact.backward(reference, hidden.double().cpu(), accumulate=False)
    assert (mine == 0).any() and torch.equal(mine.signbit().cpu(), theirs.signbit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_of_zeros_changes_no_bits(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    """Subnormal numbers included, which AVX512_BF16 would round to zero."""
    shape = (50, 12, [(67, 4), (32, 6)], 3)
    tested = case(shape, dtype, device=device)
    bits = torch.arange(50 * 67, dtype=torch.int16, device=device).view(50, 67)
    outputs = [(bits[:, :columns] - 1000).contiguous().view(dtype) for columns in (67, 32)]
    ups = [torch.zeros_like(up) for up in tested.ups]
    changed, _ = replace(tested, outputs=outputs, ups=ups).forward(ops.block_lora_)
    for before, after in zip(outputs, changed, strict=True):
        number = ~before.isnan()
        assert torch.equal(before.view(torch.int16)[number], after.view(torch.int16)[number])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_memory_and_what_lies_around_it(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    tested = case(MEDIUM, dtype, device=device)
    outputs, hidden = tested.forward(ops.block_lora_)
    grads = tested.backward(ops.block_lora_backward_, hidden)
    moved = {
        name: embed(value, "unaligned")
        for name, value in {
            "input": tested.input,
            "output": tested.outputs[0],
            "grad": tested.grads[0],
            "hidden": hidden,
            "grad_input": torch.ones_like(tested.input),
            "down": tested.downs[0],
            "up": tested.ups[0],
            "grad_down": tested.downs[0],
            "grad_up": tested.ups[0],
        }.items()
    }
    view = {name: pair[0] for name, pair in moved.items()}
    downs, ups = [view["down"], *tested.downs[1:]], [view["up"], *tested.ups[1:]]
    again = ops.block_lora_(
        [view["output"], *(o.clone() for o in tested.outputs[1:])],
        view["input"], downs, ups, **tested.options,
    )  # fmt: skip
    assert torch.equal(again, hidden) and torch.equal(view["output"], outputs[0])
    ops.block_lora_backward_(
        view["grad_input"],
        [view["grad_down"], *(torch.empty_like(d) for d in downs[1:])],
        [view["grad_up"], *(torch.empty_like(u) for u in ups[1:])],
        [view["grad"], *tested.grads[1:]], view["input"], view["hidden"], downs, ups,
        accumulate=True, **tested.options,
    )  # fmt: skip
    assert torch.equal(view["grad_input"], grads[0])
    assert torch.equal(view["grad_down"], grads[1][0])
    assert torch.equal(view["grad_up"], grads[2][0])
    for _, buffer in moved.values():
        assert (buffer[:3] == 777).all() and (buffer[-4:] == 777).all()


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(ops: Any, dtype: torch.dtype) -> None:
    tested = case((1000, 96, [(130, 9)], 2), dtype, dropout=0.1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            outputs, hidden = tested.forward(ops.block_lora_)
            grad_input, grad_downs, grad_ups = tested.backward(ops.block_lora_backward_, hidden)
            results.append([*outputs, hidden, grad_input, *grad_downs, *grad_ups])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cuda-emulated", GPU], indirect=True)
def test_what_is_dropped_is_the_same_everywhere(backend: Backend) -> None:
    """The identity as down-projection shows the input as it is read."""
    features = 19
    tested = case((9, features, [(2, features)], 1), torch.float32, dropout=0.25)
    tested = replace(tested, input=torch.ones(9, features), downs=[torch.eye(features)])
    expected = dropout_factors(9, features, 0.25, *drawn_from(tested))
    _, here = tested.forward(torch.ops.partune.block_lora_)
    assert torch.equal(here, expected.float())
    options = {
        k: v.to(backend.device) if isinstance(v, torch.Tensor) else v
        for k, v in tested.options.items()
    }
    there = backend.ops.block_lora_(
        [output.to(backend.device) for output in tested.outputs],
        tested.input.to(backend.device),
        [down.to(backend.device) for down in tested.downs],
        [up.to(backend.device) for up in tested.ups],
        **options,
    )
    assert torch.equal(there.cpu(), here)


def drawn_from(tested: Any) -> tuple[Any, ...]:
    return tuple(tested.options[name] for name in ("seed", "step", "layer_id"))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_dropout_keeps_its_share_and_the_mean(ops: Any) -> None:
    tested = case((1, 200_000, [(1, 1)], 1), torch.float64, dropout=0.05)
    seed, step, layer_id = drawn_from(tested)
    factors = dropout_factors(1, 200_000, 0.05, seed, step, layer_id)
    assert abs((factors == 0).double().mean() - 0.05) < 0.002
    assert abs(factors.mean() - 1) < 0.003
    for other in ((seed + 1, step, layer_id), (seed, step + 1, layer_id), (seed, step, 4)):
        assert not torch.equal(dropout_factors(1, 200_000, 0.05, *other), factors)
    check_forward(ops, tested)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_tokens(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    tested = case((5, 12, [(7, 4)], 2), dtype, device=device)
    clean, _ = tested.forward(ops.block_lora_)
    tested.input[1, 3], tested.input[3, 0] = torch.nan, torch.inf
    outputs, hidden = tested.forward(ops.block_lora_)
    assert outputs[0][1].isnan().all() and not outputs[0][3].isfinite().any()
    assert torch.equal(outputs[0][::2], clean[0][::2])
    tested.grads[0][2, 2] = torch.nan
    grad_input, grad_downs, grad_ups = tested.backward(ops.block_lora_backward_, hidden)
    assert grad_input[2].isnan().all() and grad_input[[0, 1, 3, 4]].isfinite().all()
    assert grad_downs[0].isnan().any() and grad_ups[0][2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_stays_infinity(ops: Any, device: torch.device, dtype: torch.dtype) -> None:
    """All numbers are positive, and so are both parts of the adapters' in tensor cores."""
    tested = case((5, 12, [(7, 4)], 2), dtype, device=device)
    for adapter in (*tested.downs, *tested.ups):
        adapter.fill_(1 + 2**-9)
    tested.input.abs_()[3, 0] = torch.inf
    tested.grads[0].abs_()[1, 2] = torch.inf
    outputs, hidden = tested.forward(ops.block_lora_)
    assert torch.equal(hidden.isposinf().all(1), torch.arange(5, device=device) == 3)
    assert outputs[0][3].isposinf().all() and outputs[0][[0, 1, 2, 4]].isfinite().all()
    grad_input, _, _ = tested.backward(ops.block_lora_backward_, hidden)
    assert grad_input[1].isposinf().all() and grad_input[[0, 2, 3, 4]].isfinite().all()


@on_cpu_and_gpu
def test_opcheck(ops: Any, device: torch.device) -> None:
    opcheck = torch.library.opcheck
    for share in SHARES:
        tested = case(SMALL, torch.float32, share=share, dropout=0.2, device=device)
        adapters = tested.downs, tested.ups
        arguments: tuple[Any, ...] = tested.outputs, tested.input, *adapters
        opcheck(ops.block_lora_.default, arguments, tested.options)
        _, hidden = tested.forward(ops.block_lora_)
        made = [[torch.empty_like(adapter) for adapter in both] for both in adapters]
        for grad_input in (torch.zeros_like(tested.input), None):
            arguments = grad_input, *made, tested.grads, tested.input, hidden, *adapters
            opcheck(ops.block_lora_backward_.default, arguments, tested.options)


@pytest.mark.parametrize("name", ["block_lora_", "block_lora_backward_"])
def test_the_native_kernel_refuses(backend: Backend, name: str) -> None:
    for bad in BAD_INPUTS[name]:
        if not bad.native or backend.name == "cuda":
            continue
        arguments = good(name)
        bad.spoil(arguments)
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            getattr(backend.ops, name)(**arguments)


def test_sizes_beyond_32_bits_are_counted() -> None:
    tokens, features = 2**20, 2**12
    meta = {"device": "meta", "dtype": torch.bfloat16}
    x, y = torch.empty(tokens, features, **meta), torch.empty(tokens, 8, **meta)
    down, up = torch.empty(4, features // 2, device="meta"), torch.empty(8, 4, device="meta")
    hidden = OPS["block_lora_"].overload([y], x, [down], [up], scales=[1.0])
    assert hidden.shape == (tokens, 4) and hidden.dtype == torch.float32
