"""Loads the native core, and at the first call with a CUDA tensor its CUDA kernels.

Whoever looks for GPUs initialises CUDA, and then no forked child of the process can use it. So
nothing looks at import: stand-ins wait on the dispatcher's CUDA key, and their first call does.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("auto", "cuda", "reference")
OLDEST_GPU = (7, 5)  # CUDA 13 compiles for no older one


def format_cuda_version(number: int) -> str:
    """The runtime's spelling of a CUDA version as people write it: 13000 -> "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def how_to_serve(capabilities: Iterable[tuple[int, int]]) -> str:
    """What to build for GPUs of these compute capabilities, as a sentence."""
    wanted = sorted(set(capabilities))
    if too_old := [pair for pair in wanted if pair < OLDEST_GPU]:
        names = ", ".join(f"sm_{major}{minor}" for major, minor in too_old)
        return f"CUDA 13 compiles for sm_75 and later, so no build can have one for {names}"
    archs = " ".join(f"{major}{minor}" for major, minor in wanted)
    listed = ";".join(f"{major}.{minor}" for major, minor in wanted)
    return (
        f'Build one: `make wheel ARCHS="{archs}"`, '
        f'or `TORCH_CUDA_ARCH_LIST="{listed}" pip install .`, in the source tree'
    )


def why_no_cuda(core: ModuleType) -> str | None:
    """Why this build's CUDA kernels can't run on this machine, or None; initialises CUDA."""
    built_with = core.build_info()["cuda"]
    if built_with is None:
        return "this build has none (PARTUNE_CUDA=0 or ARCHS=cpu)"
    probe = core.cuda_probe()
    if 0 < probe["driver"] // 1000 < built_with // 1000:
        return (
            f"the driver supports CUDA {format_cuda_version(probe['driver'])}, and this build "
            f"needs {format_cuda_version(built_with)}. Update the driver (580 or later for CUDA 13)"
        )
    if not probe["devices"]:
        return f"there is no GPU to run on ({probe['error'] or 'none found'})"
    if not any(has_binary for *_, has_binary in probe["devices"]):
        names = ", ".join(f"{name} (sm_{a}{b})" for name, a, b, _ in probe["devices"])
        fix = how_to_serve((major, minor) for _, major, minor, _ in probe["devices"])
        return f"this build has no binary for {names}. {fix}"
    return None


class StandIns:
    """Kernels on a dispatch key that call `settle` and then run whatever the dispatcher has.

    `settle` usually calls `step_aside` and registers the kernels that are to stay: later calls
    never come here. If it raises, the call fails, and the next one asks again.
    """

    def __init__(
        self, namespace: str, op_names: Iterable[str], key: str, settle: Callable[[], None]
    ) -> None:
        self._key, self._settle = key, settle
        self._library: Any = torch.library.Library(namespace, "IMPL", key)  # type: ignore[no-untyped-call]
        operators = getattr(torch.ops, namespace)
        self._overloads = [getattr(operators, name).default for name in op_names]
        self._kept: list[Any] = []
        implement: Callable[..., None] = self._library.impl
        for overload in self._overloads:
            implement(overload._name, self._kernel(overload), key, with_keyset=True)

    def _kernel(self, overload: Any) -> Callable[..., Any]:
        def stand_in(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            self._settle()
            return overload.redispatch(keyset, *args, **kwargs)

        return stand_in

    def step_aside(self) -> None:
        """Free the key. The kernels live on: another thread may be about to enter one."""
        self._kept += [torch.library.get_kernel(op, self._key) for op in self._overloads]
        self._library._destroy()


_lock = threading.Lock()
_core: ModuleType | None = None
_load_error: str | None = None
_stand_ins: StandIns | None = None  # there until a call with a CUDA tensor, or `partune info`
_cuda_status: str | None = "the native core could not be loaded"
_unusable: str | None = None
_backend = os.environ.get("PARTUNE_BACKEND") or "auto"
try:
    from partune import _C as _core  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    _load_error = str(error)


def _settle(warn: bool = True) -> None:
    """Register the CUDA kernels if they can run, else leave their key to the reference; once."""
    global _cuda_status, _stand_ins
    with _lock:
        if _stand_ins is None or _core is None:
            return
        _cuda_status = why_no_cuda(_core)
        if _cuda_status is None or _backend == "auto":
            _stand_ins.step_aside()
            _stand_ins = None
        if _cuda_status is None:
            _core.register_cuda()
            return
    if _backend == "cuda" and warn:
        raise RuntimeError(f"PARTUNE_BACKEND=cuda, but its kernels can't run: {_cuda_status}")
    if warn:
        warnings.warn(
            f"partune's CUDA kernels can't run here: {_cuda_status}. The plain-torch reference "
            "runs instead, right but slow.",
            stacklevel=2,
        )


if _core is not None:
    if torch.version.cuda is None:
        _cuda_status = f"torch {torch.__version__} was built without CUDA"
    elif _backend == "reference":
        _cuda_status = "PARTUNE_BACKEND=reference keeps them off"
    if _backend not in BACKENDS:
        _unusable = f"PARTUNE_BACKEND must be one of {', '.join(BACKENDS)}, got '{_backend}'"
    elif _backend == "cuda" and torch.version.cuda is None:
        _unusable = f"PARTUNE_BACKEND=cuda, but its kernels can't run: {_cuda_status}"
    elif _backend != "reference" and torch.version.cuda is not None:
        _names = [schema.partition("(")[0] for _, schema in _core.schemas()]
        _stand_ins = StandIns("partune", _names, "CUDA", _settle)


def load_error() -> str | None:
    """Why the native core is missing, or None if it is there."""
    return _load_error


def cuda_status() -> str | None:
    """Why the CUDA kernels are not registered, or None if they are; may initialise CUDA."""
    _settle(warn=False)
    return _unusable or _cuda_status


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
