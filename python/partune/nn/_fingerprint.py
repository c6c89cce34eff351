"""SHA-256 of a model's tensors."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """One hexadecimal digest for each, over name, shape, dtype and bytes."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"model: {name} is on the meta device; load the weights first")
    with ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:  # hashing frees the GIL
        return dict(zip(tensors, pool.map(_digest, tensors.items()), strict=True))


def _digest(item: tuple[str, Tensor]) -> str:
    name, tensor = item
    digest = hashlib.sha256(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
    for values in _plain(tensor.detach()):
        values = values.cpu().contiguous()
        if values.numel() > 0:
            size = values.numel() * values.element_size()
            digest.update((ctypes.c_char * size).from_address(values.data_ptr()))
    return digest.hexdigest()


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory: of torchao's quantised ones, their values and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))
