"""The words of a failed check: which argument, what it got, what it wants.

An optimizer's step checks thousands of tensors: a name is put together only when its check fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
FLOATING = (torch.float64, torch.float32, *SIXTEEN_BIT)
PARAMETER_ID_LIMIT = 2**32
COLUMN_LIMIT = 2**31


def label(name: str, index: int | None) -> str:
    return name if index is None else f"{name}[{index}]"


def tensor(name: str, value: Any, device: torch.device | None, index: int | None = None) -> None:
    """A tensor, on the device where one is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{label(name, index)}: got {type(value).__name__}, want a tensor")
    if device is not None and value.device != device:
        raise ValueError(f"{label(name, index)}: got device {value.device}, want {device}")


def tensors(name: str, values: Any, device: torch.device | None) -> None:
    """A list of tensors, all on the device where one is given."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name}: got {type(values).__name__}, want a list of tensors")
    for index, value in enumerate(values):
        if not isinstance(value, Tensor) or value.device != device:
            tensor(name, value, device, index)


def length(name: str, values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{name}: got {len(values)} entries, want {count}, one per parameter")


def dtype(
    name: str, value: Tensor, wanted: tuple[torch.dtype, ...], index: int | None = None
) -> None:
    if value.dtype not in wanted:
        got, *names = (str(d).removeprefix("torch.") for d in (value.dtype, *wanted))
        raise TypeError(f"{label(name, index)}: got dtype {got}, want {' or '.join(names)}")


def same_dtype(name: str, value: Tensor, first: torch.dtype, index: int) -> None:
    if value.dtype is not first:
        raise TypeError(
            f"{label(name, index)}: got dtype {value.dtype} beside {first}, want one dtype per call"
        )


def grad_dtype(grad: Tensor, weight: Tensor, index: int) -> None:
    """The parameter's dtype, or float32 beside 16-bit parameters."""
    if grad.dtype is not weight.dtype:
        wide = (torch.float32,) if weight.dtype in SIXTEEN_BIT else ()
        dtype("grads", grad, (weight.dtype, *wide), index)


def shape(name: str, value: Tensor, wanted: Sequence[int], index: int | None = None) -> None:
    if value.shape != wanted:
        raise ValueError(
            f"{label(name, index)}: got shape {tuple(value.shape)}, want {tuple(wanted)}"
        )


def contiguous(name: str, value: Tensor, index: int | None = None) -> None:
    if not value.is_contiguous():
        raise ValueError(
            f"{label(name, index)}: got strides {value.stride()} for shape {tuple(value.shape)}, "
            "want a contiguous tensor"
        )


def strides(name: str, value: Tensor, like: Tensor, index: int) -> None:
    """The strides of a dense parameter, so that equal storage positions are equal entries."""
    if value.stride() == like.stride():
        return
    pairs = zip(value.shape, value.stride(), like.stride(), strict=True)
    if any(size > 1 and stride != wanted for size, stride, wanted in pairs):
        raise ValueError(
            f"{label(name, index)}: got strides {value.stride()}, want the dense parameter's "
            f"{like.stride()}"
        )


def without_gaps(name: str, value: Tensor, index: int | None = None) -> None:
    """Elements side by side in memory, in whatever order of the dimensions."""
    if value.is_contiguous():
        return
    wanted = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1 and stride != wanted:
            raise ValueError(
                f"{label(name, index)}: got strides {value.stride()} for shape "
                f"{tuple(value.shape)}, want a dense parameter without gaps"
            )
        wanted *= size


def scalar(
    name: str,
    value: Any,
    wanted: tuple[torch.dtype, ...],
    device: torch.device | None,
    index: int | None = None,
) -> None:
    """A 0-d tensor."""
    tensor(name, value, device, index)
    if value.dim() != 0:
        raise ValueError(f"{label(name, index)}: got shape {tuple(value.shape)}, want a 0-d tensor")
    dtype(name, value, wanted, index)


def one_of(name: str, value: Any, wanted: tuple[str, ...]) -> None:
    if value not in wanted:
        raise ValueError(f"{name}: got {value!r}, want {' or '.join(map(repr, wanted))}")


def parameter_id(name: str, value: int, index: int | None = None) -> None:
    if not 0 <= value < PARAMETER_ID_LIMIT:
        raise ValueError(f"{label(name, index)}: got {value}, want 0 <= id < 2**32")


def indices(name: str, value: Tensor, wanted: torch.dtype, index: int | None = None) -> None:
    """Shape and dtype of a CSR's tensor, not its contents: `validate_csr` reads those, once."""
    if value.dtype is not wanted:
        dtype(name, value, (wanted,), index)
    if value.dim() != 1:
        raise ValueError(f"{label(name, index)}: got shape {tuple(value.shape)}, want 1-D")
    contiguous(name, value, index)


def csr(crow_indices: Tensor, col_indices: Tensor, index: int | None = None) -> None:
    indices("crow_indices", crow_indices, torch.int64, index)
    indices("col_indices", col_indices, torch.int32, index)
    if crow_indices.numel() == 0 and col_indices.numel() != 0:
        raise ValueError(
            f"{label('crow_indices', index)}: got no entries beside {col_indices.numel()} "
            "col_indices, want rows + 1"
        )
