"""Family sampled_grad: a linear layer's weight gradient at selected entries alone.

Of dYᵀX only the values at the entries of a CSR are formed: a sampled dense-dense product. A matrix
of the weight's size never exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partune.ops import _checks as check
from partune.ops._contract import OPS, Op, call, register
from partune.ops.csr import row_indices

ROUTES = ("sampled", "panels", "blocks")
BLOCK = 4  # rows, and columns, of a block of "blocks"
# From which density on the panels are faster than single entries, and than blocks; never where
# nothing is said. On the CPU as measured (Zen 4, AVX-512, one thread, 256 to 1024 tokens, 1024 and
# 2048 wide), single entries of float64 excepted, which are an estimate: dense products of float16
# take fifteen times as long there. On a GPU arithmetic for an H100, nothing measured: the dense
# product at 600 (16 bits), 50 and 60 TFLOP/s, packed columns from its L2 cache at 5 TB/s, of which
# a load serves four entries of a block.
PANELS_FROM = {
    ("cpu", torch.float64): (0.4, 0.8),
    ("cpu", torch.float32): (0.5, 0.95),
    ("cpu", torch.bfloat16): (0.35, 0.45),
    ("cuda", torch.float64): (0.02, 0.08),
    ("cuda", torch.float32): (0.05, 0.2),
    ("cuda", torch.bfloat16): (0.008, 0.03),
    ("cuda", torch.float16): (0.008, 0.03),
}
_NEVER = (float("inf"), float("inf"))
# Rows of the product that the reference holds at a time.
REFERENCE_ROWS = 256


def sampled_grad_(
    values: Tensor,
    grad: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    route: str = "auto",
) -> None:
    """Add the entries of gradᵀ @ input that a CSR names to a vector of values.

    With y = x @ weight.t() these are the selected entries of the weight's gradient. Sums are
    float32 (float64 of float64) whatever is multiplied; "panels" of 16 bits rounds each to 16 bits
    before it is added, as the dense product does. For a weight that is stored [in, out], as GPT-2's
    Conv1D has it, pass x as grad and the output's gradient as input.

    Args:
        values: [nnz] float32 (float64 beside float64), contiguous; added to.
        grad: [tokens, rows], the output's gradient, of float64, float32, bfloat16 or float16.
        input: [tokens, columns], what the layer read, of the same dtype.
        crow_indices, col_indices: int64 [rows + 1] and int32 [nnz], ascending and row-major.
        route: "sampled" multiplies entry by entry; "panels" multiplies some rows at a time into a
            workspace and takes the entries from there; "auto" takes the faster of these by
            `choose_route`. "blocks" multiplies 4 by 4 entries at a time, with the sums of "sampled"
            bit for bit: of a CSR whose rows 4r to 4r + 3 have the same columns, in runs of 4 that
            begin at multiples of 4. That isn't checked (of another CSR the values are wrong), nor
            does "auto" know it: who has such a CSR asks for "blocks", or
            `choose_route(grad, input, col_indices, blocks=True)`.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, stride or device, or another route; for "blocks", rows, columns
            or entries that aren't whole blocks.

    Example:
        >>> values, grad, x = torch.zeros(2), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
        >>> crow, col = torch.tensor([0, 1, 2]), torch.tensor([1, 0], dtype=torch.int32)
        >>> sampled_grad_(values, grad, x, crow, col)
        >>> values
        tensor([5., 6.])
    """
    grad, input = _rows_contiguous(grad), _rows_contiguous(input)
    if route == "auto":
        matrices = isinstance(col_indices, Tensor) and _is_matrix(grad) and _is_matrix(input)
        route = choose_route(grad, input, col_indices) if matrices else ROUTES[0]
    call("sampled_grad_", values, grad, input, crow_indices, col_indices, route=route)


def sampled_grad(
    grad: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    route: str = "auto",
) -> Tensor:
    """Form the entries of gradᵀ @ input that a CSR names: `sampled_grad_` into new values.

    Args:
        grad, input, crow_indices, col_indices, route: as for `sampled_grad_`.

    Returns:
        [nnz] float32, or float64 of float64.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, stride or device, or another route; for "blocks", rows, columns
            or entries that aren't whole blocks.

    Example:
        >>> grad, x = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
        >>> crow, col = torch.tensor([0, 1, 2]), torch.tensor([1, 0], dtype=torch.int32)
        >>> sampled_grad(grad, x, crow, col)
        tensor([5., 6.])
    """
    check.tensor("grad", grad, None)
    check.tensor("col_indices", col_indices, grad.device)
    values = torch.zeros(col_indices.shape, dtype=_wide(grad), device=grad.device)
    sampled_grad_(values, grad, input, crow_indices, col_indices, route=route)
    return values


def sampled_grad_of_layer(
    grad: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    blocks: bool = False,
) -> Tensor:
    """`sampled_grad` of what a layer has checked, to be called `below_autograd`.

    With `blocks`, of a CSR whose entries are aligned blocks of 4 by 4.

    The native op checks what it can't do without. Python's checks, and the version of values that
    nobody else has seen, took 60 of the 260 µs of a call that computed next to nothing, after a
    product had emptied the caches (measured).
    """
    grad, input = _rows_contiguous(grad), _rows_contiguous(input)
    values = torch.zeros(col_indices.shape, dtype=_wide(grad), device=grad.device)
    route = choose_route(grad, input, col_indices, blocks=blocks)
    OPS["sampled_grad_"].overload(values, grad, input, crow_indices, col_indices, route=route)
    return values


def choose_route(grad: Tensor, input: Tensor, col_indices: Tensor, *, blocks: bool = False) -> str:
    """Which route of `sampled_grad_` is the faster, by the share of entries that are selected.

    With `blocks`, of a CSR of aligned blocks of 4 by 4, "blocks" takes the place of "sampled".
    """
    limit = PANELS_FROM.get((grad.device.type, grad.dtype), _NEVER)[blocks]
    entries = grad.shape[1] * input.shape[1]
    if entries > 0 and col_indices.numel() >= limit * entries:
        return "panels"
    return "blocks" if blocks else "sampled"


def _wide(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix.contiguous() if _is_matrix(matrix) and not _has_whole_rows(matrix) else matrix


def _has_whole_rows(matrix: Tensor) -> bool:
    """Each row's elements side by side, and rows that don't overlap."""
    rows, columns = matrix.shape
    if matrix.is_contiguous():
        return True
    return matrix.stride(1) == 1 and (rows <= 1 or matrix.stride(0) >= columns)


def _check_factor(name: str, factor: Tensor) -> None:
    if factor.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(factor.shape)}, want a matrix, [tokens, ...]")
    if not _has_whole_rows(factor):
        raise ValueError(
            f"{name}: got strides {factor.stride()} for shape {tuple(factor.shape)}, want rows "
            "that are contiguous"
        )
    if factor.shape[1] >= check.COLUMN_LIMIT:
        raise ValueError(f"{name}: got {factor.shape[1]} columns, want fewer than 2**31")


def check_sampled_grad_(
    values: Tensor,
    grad: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    route: str,
) -> None:
    check.tensor("values", values, None)
    for name, value in (
        ("grad", grad),
        ("input", input),
        ("crow_indices", crow_indices),
        ("col_indices", col_indices),
    ):
        check.tensor(name, value, values.device)
    check.dtype("grad", grad, check.FLOATING)
    check.dtype("input", input, (grad.dtype,))
    check.dtype("values", values, (_wide(grad),))
    _check_factor("grad", grad)
    _check_factor("input", input)
    if input.shape[0] != grad.shape[0]:
        raise ValueError(
            f"input: got shape {tuple(input.shape)} beside grad {tuple(grad.shape)}, want as many "
            "rows, one per token"
        )
    check.csr(crow_indices, col_indices)
    check.shape("crow_indices", crow_indices, (grad.shape[1] + 1,))
    check.shape("values", values, col_indices.shape)
    check.contiguous("values", values)
    check.one_of("route", route, ROUTES)
    if route == "blocks":
        _check_blocks(grad, input, col_indices)


def _check_blocks(grad: Tensor, input: Tensor, col_indices: Tensor) -> None:
    """That sizes are of whole blocks; that the entries are, nobody reads from a device."""
    for name, factor in (("grad", grad), ("input", input)):
        if factor.shape[1] % BLOCK:
            raise ValueError(
                f"{name}: got {factor.shape[1]} columns, want a multiple of {BLOCK} for route "
                f"'blocks', whose blocks are {BLOCK} by {BLOCK}; 'sampled' takes any"
            )
    if col_indices.numel() % BLOCK**2:
        raise ValueError(
            f"col_indices: got {col_indices.numel()} entries, want a multiple of {BLOCK**2} for "
            f"route 'blocks', whose blocks are {BLOCK} by {BLOCK}; 'sampled' takes any"
        )


def fake_sampled_grad_(
    values: Tensor,
    grad: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    route: str,
) -> None:
    return None


def reference_sampled_grad_(
    values: Tensor,
    grad: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    route: str,
) -> None:
    bounds, wide_input = crow_indices.tolist(), input.to(values.dtype)
    for first in range(0, grad.shape[1], REFERENCE_ROWS):
        last = min(first + REFERENCE_ROWS, grad.shape[1])
        panel = grad[:, first:last].t().to(values.dtype) @ wide_input
        rows = row_indices(crow_indices[first : last + 1])
        here = slice(bounds[first], bounds[last])
        values[here] += panel[rows, col_indices[here].to(torch.int64)]


register(
    Op(
        "sampled_grad_", "sampled_grad", sampled_grad_, check_sampled_grad_, fake_sampled_grad_,
        reference_sampled_grad_,
    )
)  # fmt: skip
