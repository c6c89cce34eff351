"""Every bad input is refused by the wrapper and by the fake kernel, with nothing written."""

import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from bad_inputs import BAD_INPUTS, CASE_IDS, CASES, good
from partune.ops._contract import OPS
from partune.ops.csr import csr_from_mask, validate_csr


def snapshot(arguments):
    return str({name: value for name, value in arguments.items()})


@pytest.mark.parametrize("op", BAD_INPUTS)
def test_good_inputs_pass(op):
    OPS[op].function(**good(op))
    OPS[op].check(**good(op))


def test_every_op_has_a_table():
    assert BAD_INPUTS.keys() == OPS.keys()


@pytest.mark.parametrize(("op", "bad"), CASES, ids=CASE_IDS)
def test_the_wrapper_refuses(op, bad):
    arguments = good(op)
    bad.spoil(arguments)
    before = snapshot(arguments)
    with pytest.raises(bad.error, match=bad.message):
        OPS[op].function(**arguments)
    assert snapshot(arguments) == before


@pytest.mark.parametrize(("op", "bad"), CASES, ids=CASE_IDS)
def test_the_fake_kernel_refuses(op, bad):
    arguments = good(op)
    bad.spoil(arguments)
    with FakeTensorMode() as mode:
        fake = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        with pytest.raises((bad.error, RuntimeError, TypeError)) as raised:
            OPS[op].overload(**fake)
    message = str(raised.value)
    if not message.startswith("partune::"):  # the dispatcher's own: it could not convert
        assert isinstance(raised.value, bad.error) and re.search(bad.message, message)


def test_without_the_native_core_the_first_use_says_why():
    script = """
import sys
sys.modules["partune._C"] = None  # importing it raises ImportError
import torch, partune.ops, partune.optim
weight = torch.nn.Parameter(torch.ones(2, 2))
weight.grad = torch.ones(2, 2)
optimizer = partune.optim.LiftAdamW([weight], density=0.5)
for use in (lambda: partune.ops.topk_csr(torch.ones(2, 2), 1), optimizer.step):
    try:
        use()
    except RuntimeError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second = run.stdout.splitlines()
    assert first == second and "partune's native core could not be loaded" in first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda crow, col: (crow.int(), col), "crow_indices: got dtype int32, want int64"),
        (lambda crow, col: (crow, col.long()), "col_indices: got dtype int64, want int32"),
        (lambda crow, col: (crow[:-1], col), "crow_indices: got shape"),
        (lambda crow, col: (crow + 1, col), "got bounds from 1 to 4"),
        (lambda crow, col: (crow[[0, 3, 1, 3]], col), "want them ascending from 0 to 3"),
        (lambda crow, col: (crow, col - 1), "got columns from -1 to 1"),
        (lambda crow, col: (crow, col + 2), "got columns from 2 to 4, want 0 <= column < 4"),
        (lambda crow, col: (crow, col[[1, 0, 2]]), "unsorted or repeated"),
        (lambda crow, col: (crow, col[[0, 0, 2]]), "unsorted or repeated"),
        (lambda crow, col: ([0], col), "crow_indices: got list, want a tensor"),
    ],
)
def test_a_csr_out_of_order_or_range_is_refused(change, message):
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)
    crow, col = csr_from_mask(mask)
    validate_csr(crow, col, 3, 4)
    with pytest.raises((TypeError, ValueError), match=message):
        validate_csr(*change(crow, col), 3, 4)
