"""Which backends the ops' tests run on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import cuda_emulator
import partune
from op_cases import GPU, Backend
from partune import _native

LEFT_OUT = pytest.StashKey[int]()

if cuda_emulator.MODE == "tsan":
    torch.set_num_threads(1)  # torch's own threads synchronise in ways that TSan can't see


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none; the summary says how many tests that were."""
    if torch.cuda.is_available():
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=on_gpu)
    config.stash[LEFT_OUT] = len(on_gpu)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{left_out} tests need a GPU and were left out")


@pytest.fixture(params=["cpu", "cuda-emulated", GPU])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Where the ops run: CPU kernels, CUDA kernels under the emulator, CUDA kernels on a GPU.

    A test that isn't meant for all of them says `@pytest.mark.parametrize("backend", [...],
    indirect=True)`.
    """
    if request.param == "cuda-emulated":
        return Backend(request.param, torch.device("cpu"), cuda_emulator.InAllOrders())
    return Backend(request.param, torch.device(request.param), torch.ops.partune)


@pytest.fixture
def ops(backend: Backend) -> Any:
    """The namespace of the backend's ops."""
    return backend.ops


@pytest.fixture
def device(backend: Backend) -> torch.device:
    """Where the backend wants its tensors."""
    return backend.device


@pytest.fixture
def load_native(monkeypatch):
    """Loads a second copy of partune._native beside a core, or beside none."""

    def load(core, backend=None, torch_cuda="13.0"):
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        if backend is None:
            monkeypatch.delenv("PARTUNE_BACKEND", raising=False)
        else:
            monkeypatch.setenv("PARTUNE_BACKEND", backend)
        # None in sys.modules makes the import fail, as a missing or broken file does.
        monkeypatch.setitem(sys.modules, "partune._C", core)
        monkeypatch.delattr(partune, "_C", raising=False)
        if core is not None:
            monkeypatch.setattr(partune, "_C", core, raising=False)
        spec = importlib.util.spec_from_file_location("native_copy", _native.__file__)
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        return native

    return load


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A second thread makes models of few numbers slower, on a busy machine fifty times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
