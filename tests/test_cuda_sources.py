"""Rules of the CUDA sources that no compiler knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cuda_kernels import (
    CUDA_SOURCES,
    ROOT,
    block_after,
    kernel_files,
    parse_kernels,
    source_kernels,
    without_comments,
)

IN_KIT_ALONE = r"__shared__|\b(?:__)?asm(?:__)?\b|<<<"
NOWHERE = r"__activemask|cooperative_groups"


def test_shared_memory_launches_and_assembly_go_through_the_kit() -> None:
    for path in CUDA_SOURCES:
        forbidden = NOWHERE if path.name == "kit.cuh" else f"{IN_KIT_ALONE}|{NOWHERE}"
        found = re.search(forbidden, without_comments(path.read_text()))
        assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


def malformed_kernels(text: str) -> list[str]:
    """What is wrong with how the kernels of a text are declared."""
    found = list(parse_kernels(text, Path("text")))
    if len(found) != len(re.findall(r"\b__global__\b", without_comments(text))):
        return ["a kernel isn't `template <...> __global__ void __launch_bounds__(kBlock) name(`"]
    return [
        f"{kernel.name}: its block size, {kernel.launch_bounds[0]}, isn't a template parameter"
        for kernel in found
        if kernel.launch_bounds[0] not in kernel.parameters
    ]


def functions_with_barriers(texts: list[str]) -> dict[str, list[str]]:
    """By name: the bodies of functions that contain, or call one that contains, a barrier or a
    warp's collective."""
    bodies: dict[str, list[str]] = {}
    for text in map(without_comments, texts):
        for match in re.finditer(r"\b(\w+)\((?:[^(){};]|\([^(){};]*\))*\)\s*(?:const\s*)?\{", text):
            if match[1] not in ("if", "for", "while", "switch"):
                bodies.setdefault(match[1], []).append(block_after(text, match.end() - 1))
    calls, waiting = r"__syncthreads\w*|__syncwarp|__\w+_sync", set[str]()
    while True:
        pattern = rf"\b(?:{'|'.join([calls, *map(re.escape, sorted(waiting))])})\b\s*[<(]"
        more = {name for name in bodies if any(re.search(pattern, body) for body in bodies[name])}
        if more == waiting:
            return {name: bodies[name] for name in waiting}
        waiting = more


def early_returns(texts: list[str]) -> list[str]:
    """Functions with barriers that have a `return` beside the one of a value at their end."""
    return [
        name
        for name, bodies in sorted(functions_with_barriers(texts).items())
        for body in bodies
        if re.search(r"\breturn\b", re.sub(r"\breturn\b[^;]+;\s*\}$", "}", body))
    ]


@pytest.mark.parametrize("name", source_kernels())
def test_every_kernel_says_what_its_machine_code_holds(name: str) -> None:
    assert source_kernels()[name].promises is not None, (
        f"the comment above {name} lacks a line `// SASS: LDG.E.128 x2`, "
        "or `// SASS: none (why)`; CONTRIBUTING.md has the form"
    )


# What a call of the kit stands for in machine code.
KIT_INSTRUCTIONS = {"cp_async": "LDGSTS", "ldmatrix": "LDSM", "mma": "HMMA"}


@pytest.mark.parametrize(
    "path", [path for path in kernel_files() if path.stem != "kit"], ids=lambda path: path.stem
)
def test_kernels_of_a_special_instruction_promise_it(path: Path) -> None:
    text = path.read_text()
    users = [user for user in kernel_files() if f'#include "{path.name}"' in user.read_text()]
    promised = {
        wanted.split(".")[0]
        for user in (path, *users)
        for kernel in parse_kernels(user.read_text(), user)
        for promise in kernel.promises or []
        for wanted in promise.counts
    }
    for call, instruction in KIT_INSTRUCTIONS.items():
        if re.search(rf"\b{call}(_\w+)?\s*[<(]", without_comments(text)):
            assert instruction in promised, f"{path.name} calls {call}: promise {instruction}"


def test_every_family_counts_the_bytes_that_it_moves() -> None:
    for kernel in source_kernels().values():
        assert "// Bytes moved" in kernel.path.read_text(), kernel.path.name


@pytest.mark.parametrize("path", kernel_files(), ids=lambda path: path.stem)
def test_kernels_are_declared_with_their_block_size(path: Path) -> None:
    assert malformed_kernels(path.read_text()) == []


def test_no_early_return_beside_a_barrier() -> None:
    assert early_returns([path.read_text() for path in kernel_files()]) == []


@pytest.mark.parametrize(
    "text",
    [
        "template <int kBlock>\n__global__ void plain_kernel() {}",
        "__global__ void __launch_bounds__(256) untemplated_kernel() {}",
        "template <int kBlock>\n__global__ void __launch_bounds__(256) fixed_kernel() {}",
    ],
)
def test_a_kernel_without_its_block_size_is_found(text: str) -> None:
    assert malformed_kernels(text)


def test_a_kernel_with_its_block_size_is_read() -> None:
    text = """// Adds.
// SASS <float> sm_80+: LDG.E.128 x2, STG.E.128
template <typename T, int kBlock>
__global__ void __launch_bounds__(kBlock, 3)
    add_kernel(T* x) { if (x) { *x += 1; } }
"""
    assert malformed_kernels(text) == []
    (kernel,) = parse_kernels(text, Path("text"))
    assert (kernel.name, kernel.body) == ("add_kernel", "{ if (x) { *x += 1; } }")
    assert kernel.block_size("float, 256") == 256
    (promise,) = kernel.promises
    assert promise.counts == {"LDG.E.128": 2, "STG.E.128": 1}
    assert promise.covers("float, 256", "sm_80") and promise.covers("float, 256", "sm_90a")
    assert not promise.covers("float, 256", "sm_75") and not promise.covers("Half, 256", "sm_80")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("void f(int n) { if (n) return; __syncthreads(); }", ["f"]),
        ("void f(int n) { __syncwarp(); } void g() { f(1); if (n) { return; } }", ["g"]),
        ("int f(int n) { if (n) return 1; return __shfl_sync(~0u, n, 0); }", ["f"]),
        ("int f(int n) { __syncthreads(); return n; } void g() { f<2>(1); }", []),
        ("void f(int n) { // return before __syncthreads()\n return; }", []),
    ],
)
def test_an_early_return_is_found(text: str, found: list[str]) -> None:
    assert early_returns([text]) == found
