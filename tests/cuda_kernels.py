"""CUDA kernels as the sources declare them, and as the built module holds them."""

from __future__ import annotations

import functools
import importlib.machinery
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from partune import _native

ROOT = Path(__file__).resolve().parent.parent
# From sm_90 on, shared memory is counted with what the driver takes of it for every block.
RESERVED_SHARED = 1024


class Usage(NamedTuple):
    """What one kernel takes on one architecture; shared, stack and local are bytes."""

    registers: int
    shared: int
    stack: int
    local: int


class Promise(NamedTuple):
    """One comment line `// SASS <arguments> sm_NN+: INSTRUCTION xCOUNT, ...` above a kernel."""

    arguments: str  # instantiations whose template arguments begin so; "" is all
    least_arch: int
    counts: dict[str, int]

    def covers(self, arguments: str, arch: str) -> bool:
        return arguments.startswith(self.arguments) and arch_number(arch) >= self.least_arch


class SourceKernel(NamedTuple):
    name: str
    path: Path
    parameters: list[str]  # names of the template's parameters
    launch_bounds: list[str]
    promises: list[Promise] | None  # None: no line of the comment tells
    body: str

    def block_size(self, arguments: str) -> int:
        """Threads of a block of the instantiation with these template arguments."""
        values = split_list(arguments)
        if len(values) != len(self.parameters):
            raise LookupError(f"the built {self.name}<{arguments}> is another: run `make build`")
        return int(values[self.parameters.index(self.launch_bounds[0])])


# ---- sources ----

DECLARATION = re.compile(
    r"(?P<comment>(?:^//.*\n)*)"
    r"^template <(?P<parameters>[^{};]*?)>\s+"
    r"__global__ void __launch_bounds__\((?P<bounds>(?:[^()]|\([^()]*\))*)\)\s+(?P<name>\w+)\(",
    re.MULTILINE,
)
PROMISE = re.compile(r"// SASS(?: <(?P<arguments>.*)>)?(?: sm_(?P<arch>\d+)\+)?: (?P<wanted>.+)")


def without_comments(text: str) -> str:
    """C++ text whose comments and string literals are blank."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.DOTALL)


def split_list(text: str) -> list[str]:
    """The parts between those commas that stand in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "<({[") - (character in ">)}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def block_after(text: str, start: int) -> str:
    """The first {...} at or after a position, braces included."""
    begin = text.index("{", start)
    depth = 0
    for end in range(begin, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[begin : end + 1]
    raise ValueError(f"a brace is never closed: {text[begin : begin + 60]!r}")


def parse_promises(comment: str) -> list[Promise] | None:
    promises = []
    for line in comment.splitlines():
        if not line.startswith("// SASS"):
            continue
        match = PROMISE.fullmatch(line)
        if not match:
            raise ValueError(f"cannot read '{line}'; CONTRIBUTING.md has the form")
        if re.fullmatch(r"none \(.+\)", match["wanted"]):
            promises.append(Promise("", 0, {}))
            continue
        counts = {}
        for wanted in split_list(match["wanted"]):
            item = re.fullmatch(r"([A-Z][A-Z0-9.]*)(?: x(\d+))?", wanted)
            if not item:
                raise ValueError(f"cannot read '{wanted}' in '{line}'")
            counts[item[1]] = int(item[2] or 1)
        promises.append(Promise(match["arguments"] or "", int(match["arch"] or 0), counts))
    return promises or None


def parse_kernels(text: str, path: Path) -> Iterator[SourceKernel]:
    code = without_comments(text)
    for match in DECLARATION.finditer(text):
        yield SourceKernel(
            name=match["name"],
            path=path,
            parameters=[
                parameter.split("=")[0].split()[-1] for parameter in split_list(match["parameters"])
            ],
            launch_bounds=split_list(match["bounds"]),
            promises=parse_promises(match["comment"]),
            body=block_after(code, match.end()),
        )


# Headers of the CPU bodies alone are none of CUDA's.
CUDA_SOURCES = [
    path
    for path in (ROOT / "csrc").rglob("*")
    if path.suffix in (".cu", ".cuh", ".h") and not path.name.endswith("_cpu.h")
]


def kernel_files() -> list[Path]:
    return sorted((ROOT / "csrc" / "kernels").glob("*.cuh"))


@functools.cache
def source_kernels() -> dict[str, SourceKernel]:
    kernels = (k for path in kernel_files() for k in parse_kernels(path.read_text(), path))
    return {kernel.name: kernel for kernel in kernels}


# ---- the built module ----


def arch_number(arch: str) -> int:
    """75 of sm_75, 90 of sm_90a."""
    return int(re.sub(r"\D", "", arch))


def module_path() -> Path:
    return Path(_native.require().__file__)


def cuobjdump(*arguments: str, of: Path | None = None) -> Iterator[str]:
    """What the tool prints of the built module, or of an object file, line by line."""
    found = importlib.machinery.PathFinder.find_spec("nvidia")
    folders = [
        *(Path(folder) / "cu13" for folder in (found and found.submodule_search_locations) or []),
        *([Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []),
    ]
    tools = [str(folder / "bin" / "cuobjdump") for folder in folders] + ["cuobjdump"]
    tool = next(filter(None, map(shutil.which, tools)), None)
    if tool is None:
        raise FileNotFoundError("cuobjdump is missing; the package nvidia-cuda-cuobjdump has it")
    with subprocess.Popen(
        [tool, *arguments, str(of or module_path())], stdout=subprocess.PIPE, text=True
    ) as process:
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)


@functools.cache
def readable(mangled: str) -> str:
    """`sparse_adamw_kernel<float, float, float, 256>` of a mangled name."""
    if shutil.which("c++filt") is None:
        raise FileNotFoundError("c++filt is missing; it comes with the compiler")
    run = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True)
    name = run.stdout.strip().replace("partune::", "")
    depth = 0
    for end, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:end].removeprefix("void ")
    return name


def name_and_arguments(kernel: str) -> tuple[str, str]:
    """The template's name and its arguments: "a<b, 1>" gives "a" and "b, 1"."""
    name, _, arguments = kernel.partition("<")
    return name, arguments.removesuffix(">")


@functools.cache
def resource_usage() -> dict[str, dict[str, Usage]]:
    """Usage by readable kernel and architecture."""
    usage: dict[str, dict[str, Usage]] = {}
    arch = kernel = ""
    for line in cuobjdump("--dump-resource-usage"):
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = readable(match[1])
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            shared -= RESERVED_SHARED if shared and arch_number(arch) >= 90 else 0
            # A kernel that two units hold is compiled to the same code in both.
            usage.setdefault(kernel, {})[arch] = Usage(registers, shared, stack, local)
    return usage


@functools.cache
def instructions() -> dict[str, dict[str, Counter[str]]]:
    """How often each opcode, modifiers included, stands in a kernel, by kernel and architecture."""
    archs = sorted({arch for by_arch in resource_usage().values() for arch in by_arch})
    found: dict[str, dict[str, Counter[str]]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for arch, kernels in zip(archs, pool.map(disassemble, archs), strict=True):
            for kernel, counts in kernels.items():
                found.setdefault(readable(kernel), {})[arch] = counts
    return found


def disassemble(arch: str) -> dict[str, Counter[str]]:
    """Opcodes by mangled kernel."""
    opcode = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
    found: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in cuobjdump("--dump-sass", "--gpu-architecture", arch):
        if match := opcode.match(line):
            counts[match[1]] += 1
        elif match := re.match(r"\s+Function : (\w+)", line):
            counts = found[match[1]] = Counter()
    return found


def count_of(counts: Counter[str], wanted: str) -> int:
    """How many instructions have the wanted opcode and, among others, its modifiers in this order.

    LDG.E.128 counts LDG.E.128.CONSTANT and sm_75's LDG.E.128.SYS.
    """
    total = 0
    for instruction, count in counts.items():
        opcode, *modifiers = instruction.split(".")
        rest = iter(modifiers)
        first, *others = wanted.split(".")
        if opcode == first and all(other in rest for other in others):
            total += count
    return total
