"""Family select: which entries of a matrix are the k largest, and as which CSR."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from partune.ops import _checks as check
from partune.ops._contract import Op, call, register
from partune.ops.csr import Csr, csr_from_flat
from partune.ops.philox import philox


def topk_csr(scores: Tensor, k: int, *, largest: bool = True) -> Csr:
    """Select exactly the k entries of largest (or smallest) score.

    Ties go to the lower flat index; NaN ranks behind every number in both directions; -0 equals +0.

    Args:
        scores: [rows, columns] of float64, float32, bfloat16 or float16.
        k: 0 <= k <= rows·columns.

    Returns:
        crow_indices int64 [rows + 1] and col_indices int32 [k].

    Raises:
        TypeError: another dtype.
        ValueError: scores that are no matrix, or a k out of range.

    Example:
        >>> topk_csr(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), 2)
        (tensor([0, 1, 2]), tensor([1, 0], dtype=torch.int32))
    """
    return call("topk_csr", _contiguous(scores), k, largest=largest)  # type: ignore[no-any-return]


def threshold_csr(scores: Tensor, threshold: float, *, largest: bool = True) -> Csr:
    """Select all entries with score > threshold (largest) or < threshold (smallest), NaN never.

    Args:
        scores: [rows, columns] of float64, float32, bfloat16 or float16.
        threshold: compared in the scores' dtype widened to float64.

    Returns:
        crow_indices int64 [rows + 1] and col_indices int32 [nnz].

    Raises:
        TypeError: another dtype.
        ValueError: scores that are no matrix, or a NaN threshold.

    Example:
        >>> threshold_csr(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), 1.5)
        (tensor([0, 1, 2]), tensor([1, 0], dtype=torch.int32))
    """
    return call("threshold_csr", _contiguous(scores), threshold, largest=largest)  # type: ignore[no-any-return]


def topk_csr_factors(left: Tensor, right: Tensor, k: int) -> Csr:
    """Select exactly the k entries where |left @ right| is largest, without holding the product.

    Ties go to the lower flat index.

    Args:
        left: [rows, r] of float32 or float64.
        right: [r, columns] of the same dtype.
        k: 0 <= k <= rows·columns.

    Returns:
        crow_indices int64 [rows + 1] and col_indices int32 [k].

    Raises:
        TypeError: another dtype.
        ValueError: factors that do not multiply, or a k out of range.

    Example:
        >>> left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, -4.0]])
        >>> topk_csr_factors(left, right, 2)
        (tensor([0, 0, 2]), tensor([0, 1], dtype=torch.int32))
    """
    return call("topk_csr_factors", _contiguous(left), _contiguous(right), k)  # type: ignore[no-any-return]


def random_scores(
    rows: int, columns: int, *, seed: Tensor, step: Tensor, parameter_id: int
) -> Tensor:
    """Draw uniform scores in [0, 1), the same on every device (Philox4x32-10).

    Args:
        seed, step: 0-d int64 on the device of the result.
        parameter_id: 0 <= id < 2**32.

    Returns:
        float32 [rows, columns], multiples of 2**-24.

    Raises:
        TypeError: seed or step of another dtype.
        ValueError: seed or step not 0-d or on two devices, a negative size, an id out of range.

    Example:
        >>> scores = random_scores(2, 3, seed=torch.tensor(0), step=torch.tensor(1), parameter_id=0)
        >>> scores.shape
        torch.Size([2, 3])
    """
    return call(  # type: ignore[no-any-return]
        "random_scores", rows, columns, seed=seed, step=step, parameter_id=parameter_id
    )


def _contiguous(matrix: Tensor) -> Tensor:
    return matrix.contiguous() if isinstance(matrix, Tensor) else matrix


def _check_scores(scores: Tensor) -> None:
    check.tensor("scores", scores, None)
    check.dtype("scores", scores, check.FLOATING)
    _check_matrix("scores", scores)


def _check_matrix(name: str, matrix: Tensor) -> None:
    if matrix.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(matrix.shape)}, want a matrix")
    check.contiguous(name, matrix)
    _check_columns(name, matrix.shape[1])


def _check_columns(name: str, columns: int) -> None:
    if columns >= check.COLUMN_LIMIT:
        raise ValueError(f"{name}: got {columns} columns, want fewer than 2**31")


def _check_k(k: int, entries: int) -> None:
    if not isinstance(k, int | torch.SymInt) or isinstance(k, bool):
        raise TypeError(f"k: got {type(k).__name__}, want an int")
    if k < 0 or k > entries:
        raise ValueError(f"k: got {k}, want 0 <= k <= {entries}, the number of scores")


def check_topk_csr(scores: Tensor, k: int, *, largest: bool = True) -> None:
    _check_scores(scores)
    _check_k(k, scores.numel())


def check_threshold_csr(scores: Tensor, threshold: float, *, largest: bool = True) -> None:
    _check_scores(scores)
    if math.isnan(threshold):
        raise ValueError("threshold: got NaN, want a number")


def check_topk_csr_factors(left: Tensor, right: Tensor, k: int) -> None:
    check.tensor("left", left, None)
    check.tensor("right", right, left.device)
    check.dtype("left", left, (torch.float32, torch.float64))
    check.dtype("right", right, (left.dtype,))
    _check_matrix("left", left)
    _check_matrix("right", right)
    if left.shape[1] != right.shape[0] or left.shape[1] == 0:
        raise ValueError(
            f"right: got shape {tuple(right.shape)} beside left {tuple(left.shape)}, "
            "want [r, columns] to [rows, r] with r >= 1"
        )
    _check_k(k, left.shape[0] * right.shape[1])


def check_random_scores(
    rows: int, columns: int, *, seed: Tensor, step: Tensor, parameter_id: int
) -> None:
    for name, size in (("rows", rows), ("columns", columns)):
        if size < 0:
            raise ValueError(f"{name}: got {size}, want at least 0")
    _check_columns("columns", columns)
    check.scalar("seed", seed, (torch.int64,), None)
    check.scalar("step", step, (torch.int64,), seed.device)
    check.parameter_id("parameter_id", parameter_id)


def _empty_csr(like: Tensor, rows: int, nnz: int | torch.SymInt) -> Csr:
    crow_indices = like.new_empty((rows + 1,), dtype=torch.int64)
    return crow_indices, like.new_empty((nnz,), dtype=torch.int32)


def fake_topk_csr(scores: Tensor, k: int, *, largest: bool = True) -> Csr:
    return _empty_csr(scores, scores.shape[0], k)


def fake_threshold_csr(scores: Tensor, threshold: float, *, largest: bool = True) -> Csr:
    return _empty_csr(scores, scores.shape[0], torch.library.get_ctx().new_dynamic_size())


def fake_topk_csr_factors(left: Tensor, right: Tensor, k: int) -> Csr:
    return _empty_csr(left, left.shape[0], k)


def fake_random_scores(
    rows: int, columns: int, *, seed: Tensor, step: Tensor, parameter_id: int
) -> Tensor:
    return seed.new_empty((rows, columns), dtype=torch.float32)


def reference_topk_csr(scores: Tensor, k: int, *, largest: bool = True) -> Csr:
    flat = scores.flatten().to(torch.float64)
    nan = flat.isnan()
    order = torch.sort(flat.masked_fill(nan, 0.0), descending=largest, stable=True).indices
    order = order[torch.sort(nan[order], stable=True).indices]
    return csr_from_flat(order[:k].sort().values, *scores.shape)


def reference_threshold_csr(scores: Tensor, threshold: float, *, largest: bool = True) -> Csr:
    flat = scores.flatten().to(torch.float64)
    selected = flat > threshold if largest else flat < threshold
    return csr_from_flat(selected.nonzero().flatten(), *scores.shape)


def reference_topk_csr_factors(left: Tensor, right: Tensor, k: int) -> Csr:
    return reference_topk_csr((left @ right).abs(), k)


def reference_random_scores(
    rows: int, columns: int, *, seed: Tensor, step: Tensor, parameter_id: int
) -> Tensor:
    index = torch.arange(rows * columns, device=seed.device)
    words = philox(index, step=int(step), parameter_id=parameter_id, seed=int(seed))
    return ((words[0] >> 8).to(torch.float32) * 2.0**-24).view(rows, columns)


for _function, _check, _fake, _reference in (
    (topk_csr, check_topk_csr, fake_topk_csr, reference_topk_csr),
    (threshold_csr, check_threshold_csr, fake_threshold_csr, reference_threshold_csr),
    (topk_csr_factors, check_topk_csr_factors, fake_topk_csr_factors, reference_topk_csr_factors),
    (random_scores, check_random_scores, fake_random_scores, reference_random_scores),
):
    register(Op(_function.__name__, "select", _function, _check, _fake, _reference))
