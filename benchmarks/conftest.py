"""Every figure beside its peer and its limit; rounds alternate, so all meet the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from partune import _native

ROUNDS = 21
# Bars are for the machine's best instruction set; AVX2 owes half of each, baseline nothing.
SHARE_OF_BAR = {"avx512": 1.0, "avx2": 0.5}.get(_native.require().cpu_isa()[:6], 0.0)
_lines: list[str] = []


def copy_bandwidth() -> Callable[[], object]:
    """The limit of a memory-bound kernel: torch's copy of 256 MiB."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


COPY_BYTES = 2 * (256 << 20)


class Comparison:
    """Medians, and least times, of alternating rounds of some functions, in milliseconds."""

    def __init__(self, functions: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> None:
        self.functions = functions
        times: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function()
        for turn in range(rounds):
            names = list(functions) if turn % 2 else list(functions)[::-1]
            for name in names:
                start = time.perf_counter()
                functions[name]()
                times[name].append(1e3 * (time.perf_counter() - start))
        self.median = {name: statistics.median(values) for name, values in times.items()}
        self.least = {name: min(values) for name, values in times.items()}

    def ratio(self, name: str, peer: str) -> float:
        return self.median[peer] / self.median[name]


@pytest.fixture
def report(request: pytest.FixtureRequest, benchmark):
    """record(comparison, bars by peer, bytes that ours moves): prints, stores and asserts."""

    def record(
        comparison: Comparison,
        bars: dict[str, float],
        bytes_moved: float | None = None,
        rounds: int = 5,
    ) -> None:
        ours = comparison.median["ours"]
        ratios = {peer: comparison.ratio("ours", peer) for peer in bars}
        shown = ", ".join(
            f"{ratio:.2f}x {peer} (bar {bars[peer]:g})" for peer, ratio in ratios.items()
        )
        share = ""
        if bytes_moved is not None:
            copied = COPY_BYTES / comparison.median["copy"]
            share = f", {bytes_moved / ours / copied:.2f} of copy bandwidth"
        label = request.node.name.removeprefix("test_")
        _lines.append(f"{label}: {ours:.2f} ms, {shown}{share}")
        benchmark.extra_info.update(ratios)
        benchmark.pedantic(comparison.functions["ours"], rounds=rounds, warmup_rounds=1)
        missed = {peer: ratios[peer] for peer in bars if ratios[peer] < bars[peer]}
        assert not missed, _lines[-1]

    return record


@pytest.fixture
def note() -> Callable[[str], None]:
    """note(line): printed beside the ratios."""
    return _lines.append


def pytest_terminal_summary(terminalreporter) -> None:
    if _lines:
        terminalreporter.section("ratios to the peer: medians of one run, both orders")
        for line in _lines:
            terminalreporter.write_line(line)
