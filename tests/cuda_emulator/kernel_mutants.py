"""The mutants of the kernel bodies: where they are found, and how they are written into a copy.

clang-format's spaces are relied on: a binary operator has one on each side, a template's bracket
has none. What changes no result by its form alone is no mutant: `aligned` that is false more often,
which leaves the accesses that need no alignment, and atomics that add nothing or store a constant
once more.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "csrc" / "kernels"
WORK = ROOT / "build" / "mutants"

SWITCH = """
namespace partune {
inline int chosen_mutant = 0;
inline unsigned char mutants_reached[COUNT + 1];
static inline __attribute__((always_inline)) bool mutant(int number) {
  if (chosen_mutant < 0) __atomic_store_n(&mutants_reached[number], 1, __ATOMIC_RELAXED);
  return number == chosen_mutant;
}
extern "C" {
// The mutant that is in force from now on; 0: none; below: none, and places come to are noted.
__attribute__((used, visibility("default"))) inline void partune_choose_mutant(int number) {
  chosen_mutant = number;
  for (unsigned char& reached : mutants_reached) reached = 0;
}
__attribute__((used, visibility("default"))) inline int partune_mutant_count() { return COUNT; }
__attribute__((used, visibility("default"))) inline int partune_mutant_reached(int number) {
  return mutants_reached[number];
}
}
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
    nth: int  # of those of its body that change the same

    @property
    def key(self) -> str:
        again = f" ({self.nth})" if self.nth > 1 else ""
        return f"{self.body}: {self.before} -> {self.after}{again}"


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
CONSTANT = re.compile(r"!?k[A-Z]\w*")
BARRIERS = ("__syncthreads", "__syncthreads_or", "__syncwarp", "cp_async_wait", "cp_async_commit")


@dataclass
class Source:
    """One file, the switches to be written into it, and the mutants that they stand for."""

    path: Path
    first: int
    mutants: list[Mutant] = field(default_factory=list)
    edits: list[tuple[int, int, list[Mutant]]] = field(default_factory=list)
    subject: str = ""  # the name that the expression at hand is for
    guard: tuple[int, int] | None = None  # the tokens of the `if` condition at hand

    def __post_init__(self) -> None:
        self.text = self.path.read_text()
        blank = re.sub(r"//[^\n]*|#[^\n]*(?:\\\n[^\n]*)*", lambda m: " " * len(m[0]), self.text)
        blank = re.sub(
            r"[^\n;{}]*\b(?:(?<!if )constexpr|static_assert|SHARED|DYN_SHARED)\b[^;{]*;",
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
            same = [m for m in self.mutants if (m.body, m.before, m.after) == (body, before, after)]
            nth = len(same) + 1
            chosen.append(Mutant(number, name, line, body, kind, before, after, nth))
            self.mutants.append(chosen[-1])
        if chosen:
            self.edits.append((self.tokens[first].start, self.tokens[last - 1].end, chosen))

    # ---- one body ----

    def mutate_body(self, body: str, first: int, last: int) -> None:
        start = first
        i = first
        while i < last:
            text = self.tokens[i].text
            if text in BARRIERS:
                self.barrier(body, i)
                i += 1
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

    def barrier(self, body: str, i: int) -> None:
        """A call that orders threads, as a statement of its own."""
        opening = i
        while self.tokens[opening].text != "(":
            opening += 1
        end = self.partner(opening)
        if self.tokens[end + 1].text == ";" and self.tokens[i - 1].text in ";{}":
            self.add(i, end + 1, body, "barrier", ["void()"])

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
            self.expression(body, *parts[1], loop=end)
            self.statement(body, *parts[2])

    def statement(self, body: str, first: int, last: int) -> None:
        """An assignment's right side, a condition, a call's arguments."""
        if first < last and self.tokens[first].text in ("return", "else"):
            first += 1
        if first < last and self.tokens[first].text == "if":
            if self.tokens[first + 1].text == "constexpr":  # decided when the kernel is compiled
                self.statement(body, self.partner(first + 2) + 1, last)
            else:
                self.expression(body, first, last)
            return
        depth = 0
        self.subject = body
        for i in range(first, last):
            text = self.tokens[i].text
            if depth == 0 and text in ASSIGNMENT and self.tokens[i].spaced:
                self.brackets(body, first, i)
                self.subject = self.tokens[i - 1].text
                first = i + 1
            depth += text in OPENING
            depth -= text in CLOSING
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
                if before == "__syncthreads_or":
                    vote = f"int({self.words(i + 1, end)})"
                    self.add(i - 1, end + 1, body, "barrier", [vote])
                if before in BARRIERS or (before == ">" and self.tokens[i + 1].text == ")"):
                    i = end + 1
                    continue
                start, depth = i + 1, 0
                for j in range(i + 1, end + 1):
                    inner = self.tokens[j].text
                    if (inner == "," and depth == 0) or j == end:
                        if start < j:
                            self.argument(body, start, j)
                        start = j + 1
                    depth += inner in OPENING
                    depth -= inner in CLOSING
                i = end + 1
            else:
                i += 1

    def argument(self, body: str, first: int, last: int) -> None:
        """What is passed on: a value, or a lambda, which has statements of its own."""
        braces = [i for i in range(first, last) if self.tokens[i].text == "{"]
        if self.tokens[first].text == "[" and braces:
            self.mutate_body(body, braces[0] + 1, self.partner(braces[0]))
        else:
            self.expression(body, first, last)

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

    def expression(
        self, body: str, first: int, last: int, loop: int = 0, check: bool = False
    ) -> None:
        """`loop`: the token before the body that this condition keeps going."""
        if self.tokens[first].text == "if" and self.tokens[first + 1].text in "(":
            end = self.partner(first + 1)
            self.guard = (first + 2, end)
            self.expression(body, *self.guard, check=True)
            self.guard = None
            if end + 1 < last:
                self.statement(body, end + 1, last)
            return
        if self.tokens[first].text == "while":
            end = self.partner(first + 1)
            self.expression(body, first + 2, end, loop=end)
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
            self.condition(body, first, last, self.shifted(first, last, loop))
        elif compared or (check and not CONSTANT.fullmatch(self.words(first, last))):
            self.condition(body, first, last, "true")
        else:
            self.arithmetic(body, first, last)

    def shifted(self, first: int, last: int, loop: int) -> str:
        """A loop's condition, off by one: a turn more, or, where the body holds each element to the
        same bound and a turn more does nothing, a turn less for a single element."""
        (_, operator), *_ = self.split(first, last, COMPARISON)
        other = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}.get(self.tokens[operator].text)
        left, right = self.words(first, operator), self.words(operator + 1, last)
        if other == "<=" and self.tokens[loop + 1].text == "{":
            turn = self.words(loop + 1, self.partner(loop + 1))
            if re.search(rf"\bi < {re.escape(right)}\b", turn):
                return f"{left} + 1 < {right}"
        return f"{left} {other} {right}" if other else ""

    def condition(self, body: str, first: int, last: int, without: str) -> None:
        """A check that something lies within bounds, and what stands there without it."""
        if without and not self.spares_an_atomic(first, last):
            self.add(first, last, body, "bound", [without])
        for start, end in self.split(first, last, COMPARISON):
            self.arithmetic(body, start, end)

    def spares_an_atomic(self, first: int, last: int) -> bool:
        """`x != 0` before adding x, or which thread of a block stores a constant after its vote."""
        if not self.guard:
            return False
        call = self.guard[1] + 1
        call += self.tokens[call].text == "{"
        if self.tokens[call].text not in ("atomicAdd", "atomicExch"):
            return False
        arguments = self.words(call + 2, self.partner(call + 1))
        condition = self.words(first, last)
        if self.tokens[call].text == "atomicAdd":
            value = re.sub(r"static_cast<[^>]+>\((.*)\)$", r"\1", arguments.split(", ")[-1])
            return condition == f"{value} != 0"
        voted = "__syncthreads_or(" in self.words(*self.guard)
        constant = re.search(r", [\d.]+f?$", arguments)
        return bool(condition == "threadIdx.x == 0" and voted and constant)

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
                if self.tokens[start - 1].text == "%" and "aligned" in self.subject:
                    continue
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
    """The kernels with their mutants, and the emulator beside them; what is the same stays."""
    emulator = Path(__file__).parent
    texts = {
        path.relative_to(ROOT): path.read_text()
        for folder in (ROOT / "csrc", emulator)
        for path in folder.rglob("*.*")
        if path.suffix != ".pyc"
    }
    for source in sources:
        texts[source.path.relative_to(ROOT)] = source.rewritten()
    # The switch itself stands in the header that all of them include.
    kit = (KERNELS / "kit.cuh").relative_to(ROOT)
    switch = SWITCH.replace("COUNT", str(sum(len(source.mutants) for source in sources)))
    texts[kit] = texts[kit].replace("#pragma once", "#pragma once" + switch, 1)
    lists = (emulator / "CMakeLists.txt").relative_to(ROOT)
    texts[lists] = texts[lists].replace("-Werror ", "")
    for path in WORK.glob("csrc/**/*.*"):
        if path.relative_to(WORK) not in texts:
            path.unlink()
    for name, text in texts.items():
        path = WORK / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
