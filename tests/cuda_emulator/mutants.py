"""Mutation: one barrier, bound check or index term goes from a kernel body; a test must fail.

`make mutants` copies csrc, writes every mutant into the copy behind a switch, so that one build of
the emulator holds them all, and looks for a test of an op that fails with it: in the plain build,
for those that live also under AddressSanitizer, and then under ThreadSanitizer. Whatever survives
all three must be explained in survivors.toml, or the run fails. A run may be stopped at any time;
--resume goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tomllib
from kernel_mutants import KERNELS, ROOT, WORK, Mutant, collect, write_copy
from mutant_server import MODES, Outcome, serve

SURVIVORS = Path(__file__).parent / "survivors.toml"
OUTCOMES = WORK / "outcomes.jsonl"
# Seconds of tests for each mutant in the first rounds: in one mode or another most die of these.
QUICK = 3.0


@dataclass(frozen=True)
class Trial:
    """What became of a mutant in the tests of a mode, of which it got so many seconds."""

    mode: str
    seconds: float
    key: str
    outcome: Outcome


def earlier_trials(mutants: list[Mutant]) -> list[Trial]:
    """Those of the runs before; whom they let live counts only if no test has changed since."""
    if not OUTCOMES.exists():
        return []
    written = OUTCOMES.stat().st_mtime
    if any(path.stat().st_mtime > written for path in KERNELS.iterdir()):
        return []
    tests_changed = any(path.stat().st_mtime > written for path in ROOT.glob("tests/*.py"))
    keys = {m.number: m.key for m in mutants}
    found = [json.loads(line) for line in OUTCOMES.read_text().splitlines()]
    trials = [Trial(**{**trial, "outcome": Outcome(**trial["outcome"])}) for trial in found]
    trials = [trial for trial in trials if keys.get(trial.outcome.number) == trial.key]
    return [trial for trial in trials if trial.outcome.test or not tests_changed]


def run_mode(
    mode: str, mutants: list[Mutant], arguments: list[str], jobs: int, seconds: float
) -> Iterator[Outcome]:
    """What becomes of each mutant in the tests of a mode, of which it gets so many seconds."""
    import cuda_emulator
    from cuda_emulator.__main__ import surroundings

    cuda_emulator.build(mode)
    prefix, variables = surroundings(mode)
    options = ["--serve", "--jobs", str(jobs), "--seconds", str(seconds)]
    server = subprocess.Popen(
        [*prefix, sys.executable, __file__, *options, "--", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **variables}, cwd=ROOT,
    )  # fmt: skip
    assert server.stdin and server.stdout
    with server.stdin as orders:
        json.dump([(mutant.number, mutant.body) for mutant in mutants], orders)
    for done, line in enumerate(server.stdout, 1):
        yield Outcome(**json.loads(line))
        print(f"\r{mode}, {seconds:g} s each: {done} of {len(mutants)}", end="", flush=True)
    print()
    if (status := server.wait()) != 0:
        raise RuntimeError(f"{mode}: the server of the tests ended with {status}")


def table(mutants: list[Mutant], deaths: dict[int, Trial], explained: dict[str, str]) -> str:
    lines = [
        "| body | mutants | plain | asan | tsan | survive | explained | killed |",
        "| --- |" + " ---: |" * 7,
    ]
    for body in [*dict.fromkeys(m.body for m in mutants), ""]:
        own = [m for m in mutants if body in ("", m.body)]
        dead = [deaths[m.number] for m in own if m.number in deaths]
        by = [sum(death.mode == mode for death in dead) for mode in MODES]
        known = sum(m.key in explained for m in own if m.number not in deaths)
        counts = " | ".join(str(n) for n in (len(own), *by, len(own) - len(dead), known))
        share = len(dead) / max(len(own), 1)
        lines.append(f"| {body or 'all'} | {counts} | {share:.1%} |")
    return "\n".join(lines)


def report(mutants: list[Mutant], deaths: dict[int, Trial], explained: dict[str, str]) -> int:
    """Print what became of the mutants; how many of them nobody accounts for."""
    print(table(mutants, deaths, explained))
    faults = 0
    for m in mutants:
        reason = explained.get(m.key)
        if m.number not in deaths:
            faults += reason is None
            print(f"{m.file}:{m.line} {m.key}\n    {reason or 'NOT EXPLAINED'}")
        elif reason is not None:
            faults += 1
            test = deaths[m.number].outcome.test
            print(f"{m.file}:{m.line} {m.key}\n    EXPLAINED, BUT {test} FAILS")
    forever = sum(death.outcome.forever for death in deaths.values())
    share = len(deaths) / max(len(mutants), 1)
    print(f"{len(deaths)} of {len(mutants)} mutants killed ({share:.1%}),")
    print(f"{forever} of these because a test took more than twenty times its processor time")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument(
        "--match", default="", help="only mutants with this, an expression, in file or key"
    )
    parser.add_argument("--resume", action="store_true", help="keep what the runs before found out")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=float("inf"), help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("tests", nargs="*")
    options = parser.parse_args()
    arguments = options.tests or [*map(str, sorted(ROOT.glob("tests/test_ops_*.py")))]
    if options.serve:
        return serve(arguments, json.load(sys.stdin), options.jobs, options.seconds)

    sources = collect()
    every = [m for source in sources for m in source.mutants]
    mutants = [m for m in every if re.search(options.match, f"{m.file} {m.key}")]
    if options.list:
        for m in mutants:
            print(f"{m.number} {m.file}:{m.line} {m.kind} {m.key}")
        return 0
    explained = tomllib.loads(SURVIVORS.read_text())
    unknown = explained.keys() - {m.key for m in every}
    if unknown:
        print("survivors.toml explains mutants that don't exist:", *sorted(unknown), sep="\n    ")
        return 1
    write_copy(sources)
    trials = earlier_trials(every) if options.resume else []
    OUTCOMES.write_text("".join(json.dumps(asdict(trial)) + "\n" for trial in trials))
    meant = {m.number for m in mutants}
    deaths = {t.outcome.number: t for t in trials if t.outcome.test and t.outcome.number in meant}
    tried = {(t.mode, t.seconds, t.outcome.number) for t in trials}
    modes = options.modes.split(",")
    for mode, seconds in [(m, s) for s in sorted({QUICK, options.seconds}) for m in modes]:
        alive = [m for m in mutants if m.number not in deaths]
        alive = [m for m in alive if (mode, seconds, m.number) not in tried]
        if seconds > QUICK:  # what is said to be equivalent has had its seconds
            alive = [m for m in alive if m.key not in explained]
        if not alive:
            continue
        keys = {m.number: m.key for m in alive}
        for outcome in run_mode(mode, alive, arguments, options.jobs, seconds):
            trial = Trial(mode, seconds, keys[outcome.number], outcome)
            if outcome.test is not None:
                deaths[outcome.number] = trial
            with open(OUTCOMES, "a") as outcomes:
                print(json.dumps(asdict(trial)), file=outcomes)
    return int(report(mutants, deaths, explained) > 0)


if __name__ == "__main__":
    sys.path[0] = str(WORK / "tests")  # the copy of the emulator, which builds the mutants
    sys.exit(main())
