"""The CUDA side of the ops on the CPU: builds and loads it, and chooses in which order threads run.

PARTUNE_EMULATOR chooses the build: `plain`, `asan` (AddressSanitizer and UBSan) or `tsan`
(ThreadSanitizer as the race checker). The last two need the sanitizer's runtime in the process from
its start: `make sanitize-asan` and `make sanitize-tsan` see to that.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

SOURCE = Path(__file__).parent
BUILDS = SOURCE.parent.parent / "build" / "emulator"
MODES = ("plain", "asan", "tsan")
MODE = os.environ.get("PARTUNE_EMULATOR") or "plain"

FORWARD, REVERSE, SHUFFLED = range(3)
# Order, seed, and what fresh memory holds: NaN and -1, or zeros.
ORDERS = [
    (FORWARD, 0, 0xFF),
    (REVERSE, 0, 0x00),
    (SHUFFLED, 1, 0xFF),
    (SHUFFLED, 2, 0x00),
    (SHUFFLED, 3, 0xFF),
]
if MODE != "plain":  # a sanitizer sees a fault in any order, and takes its time
    ORDERS = ORDERS[2:3]


def cuda_headers() -> Path:
    """CUDA's headers: those of CUDA_HOME, else of the compiler packages."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home) / "include"
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for header in Path(folder).glob("*/include/cuda_runtime.h"):
            return header.parent
    raise RuntimeError("no CUDA headers: install nvidia-cuda-runtime or set CUDA_HOME")


def cute_headers() -> Path | str:
    """CuTe's headers, or nothing; one test needs them."""
    spec = importlib.util.find_spec("cutlass_library")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        return Path(folder) / "source" / "include"
    return ""


@functools.cache
def build(mode: str = MODE, target: str = "all") -> Path:
    """Bring a build, or one target of it, up to date; its folder."""
    folder = BUILDS / mode
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        options = (
            f"-DMODE={mode}", f"-DTORCH_ROOT={Path(torch.__file__).parent}",
            f"-DCUDA_INCLUDE={cuda_headers()}",
            f"-DCUTE_INCLUDE={cute_headers() if mode == 'plain' else ''}",
        )  # fmt: skip
        made_with = folder / "options"
        if not made_with.exists() or made_with.read_text() != "\n".join(options):
            _run("cmake", "-S", SOURCE, "-B", folder, "-G", "Ninja", *options)
            made_with.write_text("\n".join(options))
        _run("cmake", "--build", folder, "--target", target)
    return folder


def _run(*command: object) -> None:
    # A sanitizer's runtime in this process is none of the compiler's business.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    run = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment
    )
    if run.returncode != 0:
        raise RuntimeError(f"the emulator doesn't build:\n{(run.stdout + run.stderr)[:10_000]}")


@functools.cache
def load() -> Any:
    """The ops' namespace, torch.ops.partune_emulated."""
    torch.ops.load_library(build() / "libops.so")
    return torch.ops.partune_emulated


@functools.cache
def _control() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build() / "libemulator.so"))
    library.emulator_set_order.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
    return library


@contextmanager
def order(kind: int, seed: int, fill: int) -> Iterator[None]:
    """In which order blocks and threads run, and what fresh memory holds: shared, and torch's."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    _control().emulator_set_order(kind, seed, fill)
    # Only then does torch fill what it allocates, and always with NaN and the largest integers.
    torch.use_deterministic_algorithms(deterministic or fill == 0xFF)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        _control().emulator_set_order(*ORDERS[0])


@contextmanager
def arch(number: int) -> Iterator[None]:
    """Which GPU is emulated: 75, as a rule, is sm_75."""
    _control().emulator_set_arch(number)
    try:
        yield
    finally:
        _control().emulator_set_arch(75)


class InAllOrders:
    """The emulated ops. A call runs in every order; all must leave the same bits everywhere."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(_call_in_all_orders, getattr(load(), name))


def _call_in_all_orders(op: Any, *args: Any, **kwargs: Any) -> Any:
    # Whole allocations, so that what lies around a view counts too.
    memory = [
        tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)
    ]
    before = [storage.clone() for storage in memory]
    outcomes = []
    races = _control().emulator_races()
    for chosen in ORDERS:
        for storage, saved in zip(memory, before, strict=True):
            storage.copy_(saved)
        with order(*chosen):
            result = op(*args, **kwargs)
        found = _control().emulator_races() - races
        assert found == 0, f"{found} races, told on stderr"
        written = [torch.tensor([], dtype=torch.uint8).set_(storage).clone() for storage in memory]
        outcomes.append([*filter(is_tensor, tree_leaves(result)), *written])
    for chosen, outcome in zip(ORDERS[1:], outcomes[1:], strict=True):
        for a, b in zip(outcomes[0], outcome, strict=True):
            assert same_bits(a, b), f"order {chosen} leaves other bits than {ORDERS[0]}"
    return result


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaNs too, and zeros with their signs."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )
