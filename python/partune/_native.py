"""Loads the native core and its CUDA kernels, once, and remembers why one of them is not there."""

from __future__ import annotations

import os
from types import ModuleType

import torch

BACKENDS = ("auto", "cuda", "reference")


def format_cuda_version(number: int) -> str:
    """The runtime's spelling of a CUDA version as people write it: 13000 -> "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def why_no_cuda(core: ModuleType, backend: str) -> str | None:
    """Why this build's CUDA kernels can't run on this machine, or None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if backend == "reference":
        return "PARTUNE_BACKEND=reference keeps them off"
    built_with = core.build_info()["cuda"]
    if built_with is None:
        return "partune was built without them (PARTUNE_CUDA=0)"
    probe = core.cuda_probe()
    if 0 < probe["driver"] // 1000 < built_with // 1000:
        return (
            f"the driver supports CUDA {format_cuda_version(probe['driver'])}, "
            f"and this build needs {format_cuda_version(built_with)}"
        )
    if not probe["devices"]:
        return f"there is no GPU to run on ({probe['error'] or 'none found'})"
    if not any(has_binary for *_, has_binary in probe["devices"]):
        names = ", ".join(f"{name} (sm_{a}{b})" for name, a, b, _ in probe["devices"])
        return f"this build has no binary for {names}"
    return None


def _why_unusable(backend: str, cuda_status: str | None) -> str | None:
    """What is wrong with PARTUNE_BACKEND, or None."""
    if backend not in BACKENDS:
        return f"PARTUNE_BACKEND must be one of {', '.join(BACKENDS)}, got '{backend}'"
    if backend == "cuda" and cuda_status is not None:
        return f"PARTUNE_BACKEND=cuda, but its kernels can't run: {cuda_status}"
    return None


_core: ModuleType | None = None
_load_error: str | None = None
_cuda_status: str | None = "the native core could not be loaded"
_unusable: str | None = None
try:
    from partune import _C as _core  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    _load_error = str(error)
if _core is not None:
    _backend = os.environ.get("PARTUNE_BACKEND") or "auto"
    _cuda_status = why_no_cuda(_core, _backend)
    _unusable = _why_unusable(_backend, _cuda_status)
    if _cuda_status is None and _unusable is None:
        _core.register_cuda()


def load_error() -> str | None:
    """Why the native core is missing, or None if it is there."""
    return _load_error


def cuda_status() -> str | None:
    """Why the CUDA kernels are not registered, or None if they are."""
    return _cuda_status or _unusable


def require() -> ModuleType:
    """The native core; RuntimeError with the reason if it or a demanded backend can't be used."""
    if _core is None:
        raise RuntimeError(
            f"partune's native core could not be loaded ({_load_error}); reinstall partune for "
            "this Python and torch, or run `partune info` to see what is missing"
        )
    if _unusable is not None:
        raise RuntimeError(_unusable)
    return _core
