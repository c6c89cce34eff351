"""The tests of one mode, each mutant in a fork of its own.

At first every test runs without a mutant: that tells how long it takes, and to which mutated places
it comes. A test that never comes to a place can't tell a mutant there, and is left out. Those that
killed most in the least time come first.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import resource
import signal
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

import pytest
from _pytest.runner import runtestprotocol
from kernel_mutants import WORK

MODES = ("plain", "asan", "tsan")
RECORD = -1  # in place of a mutant's number: note which places are come to


@dataclass(frozen=True)
class Outcome:
    number: int
    test: str | None  # that failed; none: the mutant lives
    forever: bool = False  # the test had used many times its processor time


@dataclass
class Test:
    """What a test does without a mutant."""

    name: str
    seconds: float
    reached: list[int]


@dataclass
class Fork:
    """A mutant under way, and at which of its tests it is."""

    number: int
    body: str
    tests: list[int]
    progress: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 8))


class Server:
    """A pytest plugin, in place of pytest's loop over the tests."""

    def __init__(
        self, mutants: list[tuple[int, str]], jobs: int, seconds: float, answers: TextIO
    ) -> None:
        import cuda_emulator

        self.mutants, self.jobs, self.seconds, self.answers = mutants, jobs, seconds, answers
        cuda_emulator.load()
        self.library = cuda_emulator.build() / "libops.so"
        self.switch = ctypes.CDLL(str(self.library))
        self.kills: Counter[tuple[str, int]] = Counter()
        self.items: list[pytest.Item] = []
        self.tests: list[Test] = []
        self.record = WORK / f"{cuda_emulator.MODE}-tests.json"

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self.items = session.items
        self.tests = self.known_tests() or self.look_at_tests()
        waiting = self.mutants[::-1]
        running: dict[int, Fork] = {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                number, body = waiting.pop()
                fork = Fork(number, body, self.tests_of(number, body))
                if (child := os.fork()) == 0:
                    os._exit(self.run(fork))
                running[child] = fork
            child, status = os.wait()
            self.answer(running.pop(child), status)
        return True

    # ---- without a mutant ----

    def known_tests(self) -> list[Test]:
        """What an earlier round has found, for the same build and tests."""
        sources = [self.library, *self.items[0].path.parent.glob("*.py")]
        newest = max(path.stat().st_mtime for path in sources)
        if not self.record.exists() or self.record.stat().st_mtime < newest:
            return []
        tests = [Test(**test) for test in json.loads(self.record.read_text())]
        same = [test.name for test in tests] == [item.nodeid for item in self.items]
        return tests if same else []

    def look_at_tests(self) -> list[Test]:
        child = os.fork()
        if child == 0:
            tests = []
            numbers = range(1, self.switch.partune_mutant_count() + 1)
            for item in self.items:
                self.switch.partune_choose_mutant(RECORD)
                start = time.process_time()
                if self.fails(item):
                    self.record.write_text(f"{item.nodeid} fails without a mutant")
                    os._exit(1)
                seconds = time.process_time() - start
                reached = [n for n in numbers if self.switch.partune_mutant_reached(n)]
                tests.append(asdict(Test(item.nodeid, seconds, reached)))
            self.record.write_text(json.dumps(tests))
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            raise RuntimeError(self.record.read_text())
        return self.known_tests()

    @staticmethod
    def fails(item: pytest.Item) -> bool:
        reports = runtestprotocol(item, nextitem=None, log=False)
        return any(report.failed for report in reports)

    # ---- with one ----

    def tests_of(self, number: int, body: str) -> list[int]:
        """The tests that come to a mutant's place, best first, for as long as it may take."""

        def promise(index: int) -> float:
            kills = self.kills[body, index] + 0.1 * self.kills["", index] + 0.01
            return kills / (self.tests[index].seconds + 0.02)

        reaching = [i for i, test in enumerate(self.tests) if number in test.reached]
        left = self.seconds
        chosen: list[int] = []
        for index in sorted(reaching, key=promise, reverse=True):
            if chosen and left < self.tests[index].seconds:
                continue
            left -= self.tests[index].seconds
            chosen.append(index)
        return chosen

    def run(self, fork: Fork) -> int:
        """In the child: 1 as soon as a test fails."""
        self.switch.partune_choose_mutant(fork.number)
        for place, index in enumerate(fork.tests):
            fork.progress[:8] = place.to_bytes(8, "little")
            # Processor time: the machine may be busy, and may stop this process for a while.
            used = time.process_time()
            limit = math.ceil(used + 5 + 20 * self.tests[index].seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            if self.fails(self.items[index]):
                return 1
        return 0

    def answer(self, fork: Fork, status: int) -> None:
        name = None
        if status != 0:
            index = fork.tests[int.from_bytes(fork.progress[:8], "little")]
            name = self.tests[index].name
            self.kills[fork.body, index] += 1
            self.kills["", index] += 1
        forever = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        outcome = asdict(Outcome(fork.number, name, forever))
        print(json.dumps(outcome), file=self.answers, flush=True)


def serve(arguments: list[str], mutants: list[Any], jobs: int, seconds: float) -> int:
    """Answer a line for each of `mutants`, pairs of number and body, on standard output."""
    import torch

    import cuda_emulator

    torch.set_num_threads(1)
    if cuda_emulator.MODE == "plain":  # the order in which most missing barriers tell
        cuda_emulator.ORDERS = [(cuda_emulator.REVERSE, 0, 0xFF)]
    answers = os.fdopen(os.dup(1), "w")
    server = Server([(number, body) for number, body in mutants], jobs, seconds, answers)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    if "PARTUNE_MUTANTS_VERBOSE" not in os.environ:
        os.dup2(nowhere, 2)
    options = ["-q", "-s", "--tb=no", "--assert=plain", "-p", "no:cacheprovider"]
    options += ["-p", "no:faulthandler", "-k", "emulated"]
    ended = pytest.main([*options, *arguments], plugins=[server])
    return 0 if ended in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else 1
