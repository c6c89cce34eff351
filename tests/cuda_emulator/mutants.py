"""Mutation: one barrier, bound check or index term goes from a kernel body; a test must fail.

`make mutants` copies csrc, writes every mutant into the copy behind a switch, so that one build of
the emulator holds them all, and runs the op tests once for each: plain, for those that live also
under AddressSanitizer, and then under ThreadSanitizer. Whatever survives all three must be
explained in survivors.toml, or the run fails.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tomllib
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "csrc" / "kernels"
WORK = ROOT / "build" / "mutants"
SURVIVORS = Path(__file__).parent / "survivors.toml"
MODES = ("plain", "asan", "tsan")

SWITCH = """
#include <cstdlib>
namespace partune {
static inline int read_mutant() {
  const char* text = std::getenv("PARTUNE_MUTANT");
  return text ? std::atoi(text) : 0;
}
static const int chosen_mutant = read_mutant();
static inline bool mutant(int number) { return number == chosen_mutant; }
}  // namespace partune
"""


@dataclass(frozen=True)
class Mutant:
    number: int
    file: str
    line: int
    body: str
    kind: str
    before: str
    after: str

    @property
    def key(self) -> str:
        return f"{self.body}: {self.before} -> {self.after}"


@dataclass
class Token:
    text: str
    start: int
    spaced: bool  # white space on both sides, as clang-format gives binary operators alone

    @property
    def end(self) -> int:
        return self.start + len(self.text)


TOKEN = re.compile(
    r'"(?:\\.|[^"])*"|[A-Za-z_]\w*|\d[\w.]*|<<=?|>>=?|[-+*/%&|^=!<>]=|&&|\|\||->|::|\+\+|--|\S'
)
OPENING, CLOSING = "([{", ")]}"
SUM, PRODUCT = {"+", "-"}, {"*", "/", "%"}
COMPARISON = {"<", "<=", ">", ">=", "==", "!="}
BITS = {"|", "&", "^", "<<", ">>"}
ASSIGNMENT = {"=", "+=", "-=", "|=", "*=", "&="}
# Names of pointers: a sum without one is no address.
POINTERS = {
    name
    for path in KERNELS.glob("*.*h")
    for pair in re.findall(r"\w\*+ (\w+)|, \*(\w+)", path.read_text())
    for name in pair
}
BARRIERS = ("__syncthreads", "__syncthreads_or", "__syncwarp", "cp_async_wait", "cp_async_commit")


@dataclass
class Source:
    """One file, the switches to be written into it, and the mutants that they stand for."""

    path: Path
    first: int
    mutants: list[Mutant] = field(default_factory=list)
    edits: list[tuple[int, int, list[Mutant]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.text = self.path.read_text()
        blank = re.sub(r"//[^\n]*|#[^\n]*(?:\\\n[^\n]*)*", lambda m: " " * len(m[0]), self.text)
        blank = re.sub(
            r"[^\n;{}]*\b(?:constexpr|static_assert|SHARED|DYN_SHARED)\b[^;{]*;",
            lambda m: re.sub(r"[^\n]", " ", m[0]),
            blank,
        )
        self.tokens = [
            Token(m[0], m.start(), _is_spaced(blank, m.start(), m.end()))
            for m in TOKEN.finditer(blank)
        ]
        self.line_starts = [0, *(m.end() for m in re.finditer("\n", self.text))]

    def partner(self, index: int) -> int:
        """The token that closes the bracket at `index`."""
        depth = 0
        for i in range(index, len(self.tokens)):
            depth += self.tokens[i].text in OPENING
            depth -= self.tokens[i].text in CLOSING
            if depth == 0:
                return i
        raise ValueError(f"{self.path}: unbalanced bracket")

    def words(self, first: int, last: int) -> str:
        """The source of tokens [first, last)."""
        text = self.text[self.tokens[first].start : self.tokens[last - 1].end]
        return re.sub(r"\s+", " ", text)

    def bodies(self) -> Iterator[tuple[str, int, int]]:
        """(name, first token, last token) of every function body."""
        definition = re.compile(r"\b(?:PARTUNE_FN|PARTUNE_MEMBER|__global__)\b")
        texts = [t.text for t in self.tokens]
        for i, text in enumerate(texts):
            if not definition.fullmatch(text):
                continue
            opening = i
            while texts[opening] != "(" or texts[opening - 1] == "__launch_bounds__":
                opening = self.partner(opening) + 1 if texts[opening] == "(" else opening + 1
            brace = self.partner(opening) + 1
            while texts[brace] not in ("{", ";"):
                brace += 1
            if texts[brace] == "{":
                name = texts[opening - 1]
                if text == "PARTUNE_MEMBER":
                    name = f"{self.enclosing(i)}::{name}"
                yield name, brace + 1, self.partner(brace)

    def enclosing(self, index: int) -> str:
        """The name of the struct around a member function."""
        for i in range(index, 0, -1):
            if self.tokens[i].text in ("struct", "class"):
                brace = i
                while self.tokens[brace].text not in "{;":
                    brace += 1
                if self.tokens[brace].text == "{" and self.partner(brace) > index:
                    return self.tokens[brace - 1].text
        raise ValueError(f"{self.path}: a member of no struct")

    def add(self, first: int, last: int, body: str, kind: str, variants: list[str]) -> None:
        """Mutants of the expression in tokens [first, last)."""
        before = self.words(first, last)
        chosen: list[Mutant] = []
        for after in dict.fromkeys(variants):
            number = self.first + len(self.mutants)
            line = bisect.bisect(self.line_starts, self.tokens[first].start)
            name = str(self.path.relative_to(ROOT))
            chosen.append(Mutant(number, name, line, body, kind, before, after))
            self.mutants.append(chosen[-1])
        if chosen:
            self.edits.append((self.tokens[first].start, self.tokens[last - 1].end, chosen))

    # ---- one body ----

    def mutate_body(self, body: str, first: int, last: int) -> None:
        start = first
        i = first
        while i < last:
            text = self.tokens[i].text
            if text in BARRIERS and self.barrier(body, i):
                i += 1
                start = i
            elif text == "for" and self.tokens[i + 1].text == "(":
                end = self.partner(i + 1)
                self.loop(body, i, end)
                i = start = end + 1
            elif text == "{" and self.is_value(i):
                i = self.partner(i) + 1
            elif text in "{;}":
                self.statement(body, start, i)
                i = start = i + 1
            elif text in "([":
                i = self.partner(i) + 1
            else:
                i += 1

    def is_value(self, brace: int) -> bool:
        """Whether a brace opens a value, as in `= {1, 2}` and `T{1}`, and no block."""
        before = self.tokens[brace - 1]
        return before.text in ("=", "return") or before.end == self.tokens[brace].start

    def is_pointer(self, first: int, last: int) -> bool:
        return self.tokens[last - 1].text in POINTERS or "*>(" in self.words(first, last)

    def barrier(self, body: str, i: int) -> bool:
        """A call that orders threads, as a statement of its own or as a vote in an expression."""
        opening = i
        while self.tokens[opening].text != "(":
            opening += 1
        end = self.partner(opening)
        if self.tokens[end + 1].text == ";" and self.tokens[i - 1].text in ";{}":
            self.add(i, end + 1, body, "barrier", ["void()"])
            return False
        vote = self.words(opening + 1, end)
        self.add(i, end + 1, body, "barrier", [f"int({vote})"])
        return False

    def loop(self, body: str, i: int, end: int) -> None:
        parts, start = [], i + 2
        for j in range(i + 2, end + 1):
            if self.tokens[j].text == ";" or j == end:
                parts.append((start, j))
                start = j + 1
        unrolled = self.tokens[i - 1].text == "PARTUNE_UNROLL"
        if len(parts) != 3:
            return
        self.statement(body, *parts[0])
        if not unrolled:
            self.expression(body, *parts[1], loop=True)
            self.statement(body, *parts[2])

    def statement(self, body: str, first: int, last: int) -> None:
        """An assignment's right side, a condition, a call's arguments."""
        depth = 0
        for i in range(first, last):
            text = self.tokens[i].text
            if depth == 0 and text in ASSIGNMENT and self.tokens[i].spaced:
                self.brackets(body, first, i)
                first = i + 1
            depth += text in OPENING
            depth -= text in CLOSING
        if first < last and self.tokens[first].text in ("return", "else"):
            first += 1
        if first < last:
            self.expression(body, first, last)

    def brackets(self, body: str, first: int, last: int) -> None:
        """What stands in the brackets of an expression, element by element."""
        i = first
        while i < last:
            text = self.tokens[i].text
            if text in OPENING:
                end = self.partner(i)
                before = self.tokens[i - 1].text if i else ""
                if before in BARRIERS or (before == ">" and self.tokens[i + 1].text == ")"):
                    i = end + 1
                    continue
                start, depth = i + 1, 0
                for j in range(i + 1, end + 1):
                    inner = self.tokens[j].text
                    if (inner == "," and depth == 0) or j == end:
                        if start < j:
                            self.expression(body, start, j)
                        start = j + 1
                    depth += inner in OPENING
                    depth -= inner in CLOSING
                i = end + 1
            else:
                i += 1

    def split(self, first: int, last: int, operators: set[str]) -> list[tuple[int, int]]:
        """Operands of the operators at the expression's own level."""
        parts, start, i = [], first, first
        while i < last:
            text = self.tokens[i].text
            if text in OPENING:
                i = self.partner(i)
            elif text in operators and (self.tokens[i].spaced or text in "?:") and i > start:
                parts.append((start, i))
                start = i + 1
            i += 1
        parts.append((start, last))
        return parts

    def expression(self, body: str, first: int, last: int, loop: bool = False) -> None:
        if self.tokens[first].text == "if" and self.tokens[first + 1].text in "(":
            end = self.partner(first + 1)
            self.expression(body, first + 2, end)
            if end + 1 < last:
                self.statement(body, end + 1, last)
            return
        if self.tokens[first].text == "while":
            self.expression(body, first + 2, self.partner(first + 1), loop=True)
            return
        branches = self.split(first, last, {"?", ":"})
        if len(branches) > 1:
            for start, end in branches:
                self.expression(body, start, end)
            return
        for operators, neutral in (({"||"}, "false"), ({"&&"}, "true")):
            parts = self.split(first, last, operators)
            if len(parts) > 1:
                for start, end in parts:
                    self.condition(body, start, end, neutral)
                return
        compared = len(self.split(first, last, COMPARISON)) > 1
        if compared and loop:
            self.condition(body, first, last, self.shifted(first, last))
        elif compared:
            self.condition(body, first, last, "true")
        else:
            self.arithmetic(body, first, last)

    def shifted(self, first: int, last: int) -> str:
        """A loop's condition, off by one."""
        (_, operator), *_ = self.split(first, last, COMPARISON)
        other = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}.get(self.tokens[operator].text)
        left, right = self.words(first, operator), self.words(operator + 1, last)
        return f"{left} {other} {right}" if other else ""

    def condition(self, body: str, first: int, last: int, without: str) -> None:
        """A check that something lies within bounds, and what stands there without it."""
        self.add(first, last, body, "bound", [without] if without else [])
        for start, end in self.split(first, last, COMPARISON):
            self.arithmetic(body, start, end)

    def arithmetic(self, body: str, first: int, last: int) -> None:
        parts = self.split(first, last, BITS)
        if len(parts) > 1:
            for start, end in parts:
                self.arithmetic(body, start, end)
            return
        terms = self.split(first, last, SUM)
        if len(terms) > 1:
            variants = []
            for n, (start, end) in enumerate(terms):
                if n == 0 and self.is_pointer(start, end):
                    continue
                if n == 0:
                    sign = "-" if self.tokens[end].text == "-" else ""
                    variants.append(sign + self.words(end + 1, last))
                else:
                    rest = self.words(end, last) if end < last else ""
                    variants.append(f"{self.words(first, start - 1)} {rest}".strip())
            self.add(first, last, body, "index", variants)
            for start, end in terms:
                self.arithmetic(body, start, end)
            return
        factors = self.split(first, last, PRODUCT)
        if len(factors) > 1:
            variants = []
            for start, end in factors[1:]:
                rest = self.words(end, last) if end < last else ""
                variants.append(f"{self.words(first, start - 1)} {rest}".strip())
            self.add(first, last, body, "index", variants)
        self.brackets(body, first, last)

    def rewritten(self) -> str:
        """The file with all its mutants behind switches; inner ones within the unmutated branch."""
        text = self.text
        edits = sorted(self.edits, key=lambda e: (e[0], -e[1]))

        def render(start: int, end: int, inside: list[tuple[int, int, list[Mutant]]]) -> str:
            out, at = "", start
            while inside:
                first, last, _ = inside[0]
                chosen = [m for e in inside if e[:2] == (first, last) for m in e[2]]
                children = [e for e in inside if first <= e[0] and e[1] <= last]
                children = [e for e in children if e[:2] != (first, last)]
                whole = render(first, last, children)
                if any(m.kind == "bound" for m in chosen):
                    whole = f"bool({whole})"
                switches = "".join(f"mutant({m.number}) ? ({m.after}) : " for m in chosen)
                out += f"{text[at:first]}({switches}({whole}))"
                at = last
                inside = [e for e in inside if e[0] >= last]
            return out + text[at:end]

        return render(0, len(text), edits)


def _is_spaced(text: str, start: int, end: int) -> bool:
    return text[start - 1 : start].isspace() and text[end : end + 1].isspace()


def collect() -> list[Source]:
    """Every kernel body of the project, with its mutants."""
    sources, number = [], 1
    for path in sorted(KERNELS.glob("*.cuh")):
        source = Source(path, number)
        for body, first, last in source.bodies():
            source.mutate_body(body, first, last)
        number += len(source.mutants)
        sources.append(source)
    return sources


def write_copy(sources: list[Source]) -> None:
    """The kernels with their mutants, and the emulator beside them."""
    shutil.rmtree(WORK / "csrc", ignore_errors=True)
    shutil.copytree(ROOT / "csrc", WORK / "csrc")
    for source in sources:
        (WORK / "csrc" / "kernels" / source.path.name).write_text(source.rewritten())
    # The switch itself stands in the header that all of them include.
    kit = WORK / "csrc" / "kernels" / "kit.cuh"
    kit.write_text(kit.read_text().replace("#pragma once", "#pragma once" + SWITCH, 1))
    emulator = WORK / "tests" / "cuda_emulator"
    shutil.copytree(Path(__file__).parent, emulator, dirs_exist_ok=True)
    lists = emulator / "CMakeLists.txt"
    lists.write_text(lists.read_text().replace("-Werror ", ""))


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
                limit = 4 * (time.monotonic() - start) + 20
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
