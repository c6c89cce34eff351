"""Family sparse_adamw where its kernels have edges: tiles, launches, alignment, ends of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from op_cases import StepCase, random_csr, step_case
from partune.ops._contract import OPS

# CUDA's tiles have 1024 entries, a thread four of them.
ENTRIES = [(1, 1), (1, 1023), (2, 512), (1, 1025), (5, 1), (3, 7)]
SIXTEEN_BIT = [torch.bfloat16, torch.float16]


def shifted(value: Tensor, offset: int) -> Tensor:
    """The same values from `offset` elements on in an allocation that ends with them."""
    return torch.cat([value.new_zeros(offset), value.view(-1)])[offset:].view(value.shape)


def assert_same_step(ops: Any, mine: StepCase, plain: StepCase) -> None:
    mine.run(ops.sparse_adamw_)
    plain.run(ops.sparse_adamw_)
    for a, b in zip(mine.mutated(), plain.mutated(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("values", ["exp_avgs", "exp_avg_sqs", "masters", "col"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_list_that_is_not_aligned(
    ops: Any, device: torch.device, values: str, state_dtype: torch.dtype
) -> None:
    plain = step_case(
        [(9, 23)], torch.bfloat16, state_dtype=state_dtype, masters=True, device=device
    )
    for offset in (1, 2, 3):
        mine = plain.copy()
        setattr(mine, values, [shifted(value, offset) for value in getattr(mine, values)])
        assert_same_step(ops, mine, plain.copy())


@pytest.mark.parametrize("layout", ["dense", "all selected", "compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_beyond_the_last_entry_is_touched(
    ops: Any, device: torch.device, dtype: torch.dtype, layout: str
) -> None:
    """Each matrix alone, and its last entry the last of all its memory."""
    for shape in ENTRIES:
        case = step_case(
            [shape], dtype, density=1.0, dense=layout == "dense", compact=layout == "compact",
            device=device,
        )  # fmt: skip
        expected = case.copy(device=torch.device("cpu"))
        case.run(ops.sparse_adamw_)
        expected.run(OPS["sparse_adamw_"].reference)
        for a, b in zip(case.mutated(), expected.mutated(), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=0.02, atol=1e-5)
        flag = torch.tensor(0.0, device=device)
        ops.found_inf_(flag, case.grads, case.crow, case.col)
        assert flag == 0


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_weights_with_masters_are_rounded_to_nearest(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    case = step_case([(9, 23)], dtype, masters=True, rounding="stochastic", device=device)
    case.run(ops.sparse_adamw_)
    assert torch.equal(case.weights[0].cpu()[case.mask(0)], case.masters[0].to(dtype).cpu())


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_weights_are_rounded_to_nearest_bit_for_bit(
    ops: Any, device: torch.device, dtype: torch.dtype
) -> None:
    """Without a gradient the step is a product that float32 holds exactly."""
    case = step_case(
        [(9, 23)], dtype, lr=torch.tensor(0.5), weight_decay=0.25, dense=True, device=device
    )
    case.grads[0].zero_()
    case.exp_avgs[0].zero_()
    expected = (case.weights[0].float() * 0.875).to(dtype)
    case.run(ops.sparse_adamw_)
    assert torch.equal(case.weights[0], expected)


def test_bad_gradients_anywhere_in_a_long_list(ops: Any, device: torch.device) -> None:
    """One of many matrices, one of whose many tiles has it."""
    case = step_case([(3, 5), (3, 0), (40, 100), (2, 2)], torch.float32, density=1.0, device=device)
    flag = torch.tensor(0.0, device=device)
    for matrix, place in ((0, (0, 0)), (2, (0, 3)), (2, (10, 70)), (2, (39, 99)), (3, (1, 1))):
        grads = [grad.clone() for grad in case.grads]
        grads[matrix][place] = float("inf")
        flag.zero_()
        ops.found_inf_(flag, grads, case.crow, case.col)
        assert flag == 1, f"{place} of matrix {matrix}"


@pytest.mark.parametrize("lists", [0, 1, 16, 17, 33])
@pytest.mark.parametrize("shape", [(2, 512), (1, 1500), (40, 60)], ids=str)
def test_remap_of_any_number_of_lists(
    ops: Any, device: torch.device, shape: tuple[int, int], lists: int
) -> None:
    """A launch takes sixteen; entries are counted once.."""
    old_csr, new_csr = random_csr(*shape, 0.6, seed=1), random_csr(*shape, 1.0, seed=2)
    old = [torch.randn(old_csr[1].numel()) for _ in range(lists)]
    new = [torch.full((new_csr[1].numel(),), 9.0) for _ in range(lists)]
    mine = [[value.to(device, copy=True) for value in values] for values in (new, old)]
    count = ops.remap_(*mine, *(indices.to(device) for indices in (*old_csr, *new_csr)))
    assert count == OPS["remap_"].reference(new, old, *old_csr, *new_csr)
    for a, b in zip(mine[0], new, strict=True):
        assert torch.equal(a.cpu(), b)
