"""One table of bad inputs per op, fed to its wrapper, its fake kernel and its native kernel.

`good(op)` makes arguments that pass, by the schema's names; each `Bad` spoils them. The native
kernels check for memory safety alone: `native` tells whether they too have to refuse.
"""

import torch

from bad_inputs import (
    block_lora,
    csr_entries,
    half_mask,
    sampled_grad,
    scale_shift,
    select,
    sparse_adamw,
)
from bad_inputs.case import Arguments, Bad

_FAMILIES = (
    sparse_adamw,
    csr_entries,
    select,
    half_mask,
    sampled_grad,
    block_lora,
    scale_shift,
)
_GOOD = {op: make for family in _FAMILIES for op, make in family.GOOD.items()}
BAD_INPUTS: dict[str, list[Bad]] = {
    op: table for family in _FAMILIES for op, table in family.BAD.items()
}
CASES = [(op, bad) for op, table in BAD_INPUTS.items() for bad in table]
CASE_IDS = [f"{op}-{bad.name.replace(' ', '-')}" for op, bad in CASES]


def good(op: str) -> Arguments:
    """Arguments that the op takes, made anew, with the same random numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _GOOD[op]()
