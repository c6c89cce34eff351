"""Which backends the ops' tests run on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cuda_emulator
from op_cases import GPU, Backend

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
