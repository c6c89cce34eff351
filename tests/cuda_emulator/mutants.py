"""Mutation: one barrier, bound check or index term goes from a kernel body; a test must fail.

`make mutants` copies csrc, writes every mutant into the copy behind a switch, so that one build of
the emulator holds them all, and runs the op tests once for each: plain, for those that live also
under AddressSanitizer, and then under ThreadSanitizer. Whatever survives all three must be
explained in survivors.toml, or the run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tomllib
from _pytest.runner import runtestprotocol
from kernel_mutants import ROOT, WORK, Mutant, collect, write_copy

SURVIVORS = Path(__file__).parent / "survivors.toml"
MODES = ("plain", "asan", "tsan")

# ---- the run: one server per mode, which forks for each mutant ----


class Server:
    """A pytest plugin: reads mutants' numbers and families, and tests each in a fork."""

    def __init__(self, sample: int | None) -> None:
        self.sample = sample

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        answers = os.fdopen(os.dup(1), "w")
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        limit = float("inf")
        for line in sys.stdin:
            number, family = line.split()
            start = time.monotonic()
            child = os.fork()
            if child == 0:
                os.setpgrp()
                os.environ["PARTUNE_MUTANT"] = number
                os._exit(self.run(session.items, family))
            while (waited := os.waitpid(child, os.WNOHANG))[0] == 0:
                if time.monotonic() - start > limit:
                    os.killpg(child, signal.SIGKILL)
                    waited = os.waitpid(child, 0)
                    break
                time.sleep(0.02)
            if limit == float("inf"):  # the first is no mutant: how long the tests take
                limit = 2 * (time.monotonic() - start) + 10
            print("lives" if waited[1] == 0 else "dies", file=answers, flush=True)
        return True

    def run(self, items: list[pytest.Item], family: str) -> int:
        """1 as soon as a test fails. Its family's come first, else shuffled: so some fail soon."""
        items = random.Random(0).sample(items, len(items))
        items.sort(key=lambda item: f"_{family}." not in item.path.name)
        for item in items[: self.sample]:
            reports = runtestprotocol(item, nextitem=None, log=False)
            if any(report.failed for report in reports):
                return 1
        return 0


def serve(arguments: list[str], sample: int | None) -> None:
    import torch

    import cuda_emulator

    torch.set_num_threads(1)
    cuda_emulator.build()
    cuda_emulator.ORDERS = cuda_emulator.ORDERS[:2]
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-k", "emulated"]
    pytest.main([*options, *arguments], plugins=[Server(sample)])


def run_mode(
    mode: str, mutants: list[Mutant], arguments: list[str], jobs: int, sample: int | None = None
) -> set[int]:
    """The mutants that the tests of a mode kill, or a sample of their family's."""
    import cuda_emulator
    from cuda_emulator.__main__ import surroundings

    cuda_emulator.build(mode)
    prefix, variables = surroundings(mode)
    size = [] if sample is None else ["--sample", str(sample)]
    environment = {**os.environ, **variables}
    killed: set[int] = set()
    done = 0

    def work(share: list[Mutant]) -> None:
        nonlocal done
        server = subprocess.Popen(
            [*prefix, sys.executable, __file__, "--serve", *size, "--", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        assert server.stdin and server.stdout
        for mutant in (None, *share):
            number, family = (mutant.number, Path(mutant.file).stem) if mutant else (0, "none")
            print(number, family, file=server.stdin, flush=True)
            answer = server.stdout.readline().strip()
            if answer not in ("lives", "dies"):
                raise RuntimeError(f"{mode}: the server ended at mutant {number}")
            if answer == "dies":
                if not mutant:
                    raise RuntimeError(f"{mode}: the tests fail without a mutant")
                killed.add(number)
            done += 1
            print(f"\r{mode}: {done} of {len(mutants) + jobs}", end="", flush=True)
        server.stdin.close()
        server.wait()

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, [mutants[i::jobs] for i in range(jobs)]))
    print()
    return killed


def table(mutants: list[Mutant], killed_by: dict[int, str]) -> str:
    lines = [
        "| body | mutants | plain | asan | tsan | survive | killed |",
        "| --- |" + " ---: |" * 6,
    ]
    for body in dict.fromkeys(m.body for m in mutants):
        own = [m for m in mutants if m.body == body]
        by = [sum(killed_by.get(m.number) == mode for m in own) for mode in MODES]
        share = sum(by) / len(own)
        counts = " | ".join(str(n) for n in (len(own), *by, len(own) - sum(by)))
        lines.append(f"| {body} | {counts} | {share:.0%} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--match", default="", help="only mutants whose description holds this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sample", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("tests", nargs="*")
    options = parser.parse_args()
    arguments = options.tests or [*map(str, ROOT.glob("tests/test_ops_*.py"))]
    if options.serve:
        serve(arguments, options.sample)
        return 0

    sources = collect()
    mutants = [m for source in sources for m in source.mutants if options.match in m.key]
    if options.list:
        for m in mutants:
            print(f"{m.number} {m.file}:{m.line} {m.kind} {m.key}")
        return 0
    write_copy(sources)
    killed_by: dict[int, str] = {}
    # A few tests kill most of them.
    for mode, sample in [("plain", 30), *((mode, None) for mode in options.modes.split(","))]:
        alive = [m for m in mutants if m.number not in killed_by]
        killed = run_mode(mode, alive, arguments, options.jobs, sample)
        killed_by.update(dict.fromkeys(killed, mode))
        (WORK / "killed.json").write_text(json.dumps(killed_by))
    print(table(mutants, killed_by))
    explained = tomllib.loads(SURVIVORS.read_text())
    unexplained = 0
    for m in mutants:
        if m.number not in killed_by:
            reason = explained.get(m.key)
            unexplained += reason is None
            print(f"{m.file}:{m.line} {m.key}\n    {reason or 'NOT EXPLAINED'}")
    share = len(killed_by) / max(len(mutants), 1)
    print(f"{len(killed_by)} of {len(mutants)} mutants killed ({share:.1%})")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.path[0] = str(WORK / "tests")  # the copy of the emulator, which builds the mutants
    sys.exit(main())
