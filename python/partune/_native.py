"""Loads the native core, once, and remembers why it could not be loaded."""
from __future__ import annotations

from types import ModuleType

import torch  # noqa: F401  (the core links against torch's libraries)

_core: ModuleType | None = None
_reason: str | None = None
try:
    from partune import _C as _core  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    _reason = str(error)


def load_error() -> str | None:
    """Why the native core is missing, or None if it is there."""
    return _reason


def require() -> ModuleType:
    """The native core; RuntimeError with the reason if it could not be loaded."""
    if _core is None:
        raise RuntimeError(
            f"partune's native core could not be loaded ({_reason}); reinstall partune for this "
            "Python and torch, or run `partune info` to see what is missing"
        )
    return _core
