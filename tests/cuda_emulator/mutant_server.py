"""The tests of one mode, each mutant in a fork of its own.

At first every test runs without a mutant: that tells how long it takes, and to which mutated places
it comes. A test that never comes to a place can't tell a mutant there, and is left out. Those that
killed most in the least time come first. A sanitized build takes over what the plain one has found
of tests of the same name; those of them that kill must then pass there without a mutant.
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
SLOWER = {"plain": 1, "asan": 4, "tsan": 20}  # than the plain build, about
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
        self.mode, self.builds = cuda_emulator.MODE, cuda_emulator.BUILDS
        cuda_emulator.load()
        self.switch = ctypes.CDLL(str(self.builds / self.mode / "libops.so"))
        self.kills: Counter[tuple[str, int]] = Counter()
        self.items: list[pytest.Item] = []
        self.tests: list[Test] = []
        self.killers: set[int] = set()
        self.error = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        try:
            self.test_mutants(session)
        except RuntimeError as error:
            self.error = str(error)
        return True

    def test_mutants(self, session: pytest.Session) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self.items = session.items
        seen = self.known_tests(self.mode)
        expected = {} if self.mode == "plain" else self.known_tests("plain")
        for test in expected.values():
            test.seconds *= SLOWER[self.mode]
        new = [item for item in session.items if item.nodeid not in seen | expected]
        seen |= self.look_at_tests(new)
        self.write_record(self.mode, seen)
        self.tests = [(expected | seen)[item.nodeid] for item in session.items]
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
        unseen = [i for i in self.killers if self.tests[i].name not in seen]
        self.write_record(self.mode, seen | self.look_at_tests([self.items[i] for i in unseen]))

    # ---- without a mutant ----

    def known_tests(self, mode: str) -> dict[str, Test]:
        """What an earlier round has found, with the same sources."""
        record = WORK / f"{mode}-tests.json"
        sources = [self.builds / mode / "libops.so", *self.items[0].path.parent.glob("*.py")]
        if not record.exists() or not sources[0].exists():
            return {}
        if record.stat().st_mtime < max(path.stat().st_mtime for path in sources):
            return {}
        return {test["name"]: Test(**test) for test in json.loads(record.read_text())}

    def write_record(self, mode: str, tests: dict[str, Test]) -> None:
        record = WORK / f"{mode}-tests.json"
        record.write_text(json.dumps([asdict(test) for test in tests.values()]))

    def look_at_tests(self, items: list[pytest.Item]) -> dict[str, Test]:
        """Run tests without a mutant, in a fork; all must pass."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            numbers = range(1, self.switch.partune_mutant_count() + 1)
            with os.fdopen(writing, "w") as answers:
                for item in items:
                    self.switch.partune_choose_mutant(RECORD)
                    start = time.process_time()
                    failed = self.fails(item)
                    seconds = time.process_time() - start
                    reached = [n for n in numbers if self.switch.partune_mutant_reached(n)]
                    test = Test(item.nodeid, -1 if failed else seconds, reached)
                    print(json.dumps(asdict(test)), file=answers)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as lines:
            tests = [Test(**json.loads(line)) for line in lines]
        os.waitpid(child, 0)
        failures = [test.name for test in tests if test.seconds < 0]
        failures += [item.nodeid for item in items[len(tests) :][:1]]  # at which the fork ended
        if failures:
            raise RuntimeError(f"{self.mode}: without a mutant fails {failures[0]}")
        return {test.name: test for test in tests}

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
            self.killers.add(index)
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
    answers, errors = (os.fdopen(os.dup(stream), "w") for stream in (1, 2))
    server = Server([(number, body) for number, body in mutants], jobs, seconds, answers)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)  # where sanitizers speak of every mutant
    options = ["-q", "-s", "--tb=no", "--assert=plain", "-p", "no:cacheprovider"]
    options += ["-p", "no:faulthandler", "-k", "emulated"]
    ended = pytest.main([*options, *arguments], plugins=[server])
    if ended not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        server.error = f"pytest ends with {ended}"
    print(server.error, end="", file=errors, flush=True)
    return int(server.error != "")
