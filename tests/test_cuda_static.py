"""What a build shows of CUDA kernels without a GPU: its gates, the compiler's figures, the machine
code. Rules of the source are in test_cuda_sources.py."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

import cuda_kernels
from cuda_kernels import (
    CUDA_SOURCES,
    ROOT,
    count_of,
    instructions,
    module_path,
    name_and_arguments,
    resource_usage,
    source_kernels,
)
from partune import _native

CUDA = _native.require().build_info()["cuda"]
needs_cuda = pytest.mark.skipif(CUDA is None, reason="built with PARTUNE_CUDA=0")
COMMANDS = ROOT / "build" / "native" / "compile_commands.json"


def load_kernels_script() -> ModuleType:
    """benchmarks/cuda_document.py, which `make kernels` runs."""
    spec = importlib.util.spec_from_file_location(
        "cuda_document", ROOT / "benchmarks" / "cuda_document.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernels = load_kernels_script()


def age() -> str:
    """What to add to a failure when sources are newer than what was built of them."""
    built = module_path().stat().st_mtime
    newer = [str(path.relative_to(ROOT)) for path in CUDA_SOURCES if path.stat().st_mtime > built]
    return f"\n(newer than the module: {', '.join(newer)}; run `make build`)" if newer else ""


# ---- the gates of the build ----

KERNEL = """
template <int kBlock>
__global__ void __launch_bounds__(kBlock) planted(float* x, int n) {
  const int i = int(blockIdx.x) * kBlock + int(threadIdx.x);
  %s
}
template __global__ void planted<1024>(float*, int);
"""
# By name: the kernel's body, and what the compiler has to say of it.
FAULTS = {
    "unused": ("int unused = 0; x[i] = 0;", r'"unused" was declared but never referenced'),
    "double": ("x[i] = x[i] * 0.1;", "double precision"),
    "local": (
        """float copy[64];
  for (int k = 0; k < 64; ++k) copy[k] = x[k * n];
  for (int k = 0; k < 64; ++k) copy[(k * n) & 63] += x[i];
  for (int k = 0; k < 64; ++k) x[i + k] = copy[k];""",
        "Local memory used",
    ),
    "spill": (
        """float copy[96];
#pragma unroll
  for (int k = 0; k < 96; ++k) copy[k] = x[i + k * n];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 96; ++k) x[i + k * n] = copy[95 - k];""",
        "Registers are spilled",
    ),
}


def cuda_commands() -> dict[str, list[str]]:
    """The build's own command of every CUDA source, by file name."""
    if not COMMANDS.exists():
        pytest.skip(f"{COMMANDS} is missing: not a development build")
    return {
        Path(entry["file"]).name: shlex.split(entry["command"])
        for entry in json.loads(COMMANDS.read_text())
        if entry["file"].endswith(".cu")
    }


def compile_planted(body: str, unit: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compiles a kernel of that body as the build does a unit, for its last architecture."""
    command = cuda_commands()[unit]
    archs = [argument for argument in command if argument.startswith("--generate-code=")]
    assert archs, command
    kept = [argument for argument in command if argument not in archs[:-1]]
    source, target = folder / "planted.cu", folder / "planted.o"
    source.write_text(KERNEL % body)
    kept[kept.index("-c") + 1] = str(source)
    kept[kept.index("-o") + 1] = str(target)
    return subprocess.run(kept, cwd=folder, capture_output=True, text=True)


@needs_cuda
def test_every_gate_is_set_in_every_unit() -> None:
    gates = {
        "--warn-on-spills",
        "--warn-on-local-memory-usage",
        "--warn-on-double-precision-use",
        "--warning-as-error",
    }
    for unit, command in cuda_commands().items():
        assert "-Werror=all-warnings" in command, unit
        wanted = gates - ({"--warn-on-double-precision-use"} if "float64" in unit else set())
        given = {option for word in command for option in re.findall(r"--warn[\w-]+", word)}
        assert given == wanted, f"{unit} has other gates"


@needs_cuda
def test_a_float64_unit_builds_no_other_kernels() -> None:
    """What a header's inline function launches is built by every unit that includes it."""
    for unit, command in cuda_commands().items():
        if "float64" in unit:
            target = COMMANDS.parent / command[command.index("-o") + 1]
            usage = cuda_kernels.cuobjdump("--dump-resource-usage", of=target)
            names = set(re.findall(r"Function (\w+):", "".join(usage)))
            others = [
                name for name in map(cuda_kernels.readable, sorted(names)) if is_float32(name)
            ]
            assert not others, f"{unit} builds them without the gate on double, and again: {others}"


def is_float32(kernel: str) -> bool:
    return bool(re.search(r"\b(float|BFloat16|Half)\b", kernel))


@needs_cuda
def test_a_clean_kernel_passes_the_gates(tmp_path: Path) -> None:
    run = compile_planted("x[i] = x[i] * 0.1f + float(n);", "kernels.cu", tmp_path)
    assert run.returncode == 0, run.stderr


@needs_cuda
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_the_build(fault: str, tmp_path: Path) -> None:
    body, complaint = FAULTS[fault]
    run = compile_planted(body, "kernels.cu", tmp_path)
    assert run.returncode != 0, f"the build lets {fault} through"
    assert re.search(complaint, run.stdout + run.stderr), run.stdout + run.stderr


# ---- what kernels take ----


@needs_cuda
def test_no_kernel_has_a_stack_or_local_memory() -> None:
    assert resource_usage()
    for kernel, by_arch in resource_usage().items():
        for arch, usage in by_arch.items():
            assert usage.stack == 0 and usage.local == 0, f"{kernel}, {arch}: {usage}"


def skip_unless_recorded_by(cuda: str, document: str) -> None:
    recorder = re.search(r"Compiled by CUDA ([\d.]+)\.", document)[1]
    if cuda != recorder:
        pytest.skip(f"recorded with CUDA {recorder}, built with CUDA {cuda}")


def changes(recorded: dict[str, dict[str, str]], built: dict[str, dict[str, str]]) -> list[str]:
    """One line for each figure in which a built kernel differs from its record."""
    lines = [
        f"{kernel}: recorded, no longer built" for kernel in sorted(recorded.keys() - built.keys())
    ]
    for kernel, by_arch in sorted(built.items()):
        if kernel not in recorded:
            lines.append(f"{kernel}: new, not recorded")
            continue
        for arch, cell in by_arch.items():
            before = recorded[kernel].get(arch, "")
            for name, old, new in zip(
                ("registers", "shared memory", "blocks of an SM"),
                before.split(" / "),
                cell.split(" / "),
                strict=False,
            ):
                if old != new:
                    lines.append(f"{kernel}, {arch}: {name} {compare(old, new)}")
    return lines


def compare(old: str, new: str) -> str:
    before, after = (int(text.replace(",", "") or 0) for text in (old, new))
    return f"{'grew' if after > before else 'shrank'} from {old or 'none'} to {new}"


@needs_cuda
def test_registers_and_shared_memory_are_those_recorded() -> None:
    document = kernels.DOCUMENT.read_text()
    skip_unless_recorded_by(kernels.cuda_version(), document)
    differing = changes(kernels.recorded(document), kernels.built())
    assert not differing, (
        "\n".join(differing)
        + "\n`make kernels` records it in docs/kernels.md; to commit growth is a decision"
        + age()
    )


def test_changes_are_told_with_their_direction() -> None:
    record = {"a<1>": {"sm_80": "64 / 52 / 4"}, "gone<1>": {"sm_80": "8 / 0 / 8"}}
    built = {"a<1>": {"sm_80": "65 / 48 / 3"}, "new<1>": {"sm_80": "8 / 0 / 8"}}
    assert changes(record, built) == [
        "gone<1>: recorded, no longer built",
        "a<1>, sm_80: registers grew from 64 to 65",
        "a<1>, sm_80: shared memory shrank from 52 to 48",
        "a<1>, sm_80: blocks of an SM shrank from 4 to 3",
        "new<1>: new, not recorded",
    ]


@needs_cuda
def test_the_document_is_up_to_date() -> None:
    document = kernels.DOCUMENT.read_text()
    skip_unless_recorded_by(kernels.cuda_version(), document)
    cells = kernels.built()
    for kernel, by_arch in kernels.recorded(document).items():
        for arch, cell in by_arch.items():  # architectures that this build leaves out
            if kernel in cells and arch not in cells[kernel]:
                cells[kernel][arch] = cell
    assert kernels.render(cells) == document, "run `make kernels`" + age()


def test_every_cuda_op_has_its_bytes_counted() -> None:
    assert set(kernels.cuda_ops()) <= kernels.BYTES.keys(), "add it to benchmarks/cuda_document.py"


@needs_cuda
def test_blocks_of_an_sm_are_those_of_cudas_own_calculator(tmp_path: Path) -> None:
    command = next(iter(cuda_commands().values()))
    include = Path(command[0]).parent.parent / "include"
    cases = [
        (arch, block, kernels.Usage(registers, shared, 0, 0))
        for arch in kernels.SM
        for block in (32, 96, 128, 256, 512, 1024)
        for registers in (16, 24, 33, 40, 56, 64, 65, 72, 80, 128)
        for shared in (0, 52, 1024, 9000, 24576, 49152)
        if registers * block <= 65536
    ]
    rows = "".join(
        f"{{{cuda_kernels.arch_number(arch) // 10},{cuda_kernels.arch_number(arch) % 10},"
        f"{kernels.SM[arch].threads},{kernels.SM[arch].shared},{kernels.SM[arch].reserved},"
        f"{block},{usage.registers},{usage.shared}}},\n"
        for arch, block, usage in cases
    )
    source = tmp_path / "occupancy.cpp"
    source.write_text(OCCUPANCY % rows)
    program = tmp_path / "occupancy"
    subprocess.run(["g++", "-isystem", include, source, "-o", program], check=True)
    told = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    for (arch, block, usage), blocks in zip(cases, map(int, told), strict=True):
        assert kernels.blocks_per_sm(arch, block, usage) == blocks, (arch, block, usage)


OCCUPANCY = """
#include <climits>
#include <cstdio>
#include <cuda_occupancy.h>
const int cases[][8] = {%s};
int main() {
  for (auto& c : cases) {
    cudaOccDeviceProp sm;
    sm.computeMajor = c[0], sm.computeMinor = c[1];
    sm.maxThreadsPerBlock = 1024, sm.maxThreadsPerMultiprocessor = c[2];
    sm.regsPerBlock = sm.regsPerMultiprocessor = 65536, sm.warpSize = 32, sm.numSms = 1;
    sm.sharedMemPerBlock = 49152, sm.sharedMemPerMultiprocessor = c[3];
    sm.reservedSharedMemPerBlock = c[4], sm.sharedMemPerBlockOptin = c[3] - c[4];
    cudaOccFuncAttributes kernel{};
    kernel.maxThreadsPerBlock = INT_MAX, kernel.numRegs = c[6], kernel.sharedSizeBytes = c[7];
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = c[3] - c[4] - c[7];
    cudaOccDeviceState state{};
    state.carveoutConfig = 100;  // percent of an SM's memory that may be shared memory
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &sm, &kernel, &state, c[5], 0)) return 1;
    std::printf("%%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


# ---- the machine code ----


@needs_cuda
def test_built_kernels_are_those_of_the_sources() -> None:
    built = {name_and_arguments(kernel)[0] for kernel in resource_usage()}
    assert built == source_kernels().keys(), "a kernel that isn't launched isn't built" + age()


@needs_cuda
@pytest.mark.parametrize("name", source_kernels())
def test_machine_code_holds_what_the_source_promises(name: str) -> None:
    for promise in source_kernels()[name].promises or []:
        covered = 0
        for kernel, by_arch in instructions().items():
            built, arguments = name_and_arguments(kernel)
            for arch, counts in by_arch.items():
                if built != name or not promise.covers(arguments, arch):
                    continue
                covered += 1
                for wanted, least in promise.counts.items():
                    assert count_of(counts, wanted) >= least, (
                        f"{kernel}, {arch}: {count_of(counts, wanted)} of {wanted}, "
                        f"promised {least}" + age()
                    )
        archs = {arch for by_arch in instructions().values() for arch in by_arch}
        if any(cuda_kernels.arch_number(arch) >= promise.least_arch for arch in archs):
            assert covered, f"{name}: <{promise.arguments}> is no instantiation of it" + age()


@needs_cuda
def test_no_kernel_touches_local_memory_and_only_float64_kernels_compute_in_it() -> None:
    for kernel, by_arch in instructions().items():
        float64 = re.search(r"\bdouble\b", kernel)
        for arch, counts in by_arch.items():
            for instruction in counts:
                assert not re.match(r"(LDL|STL)\b", instruction), f"{kernel}, {arch}: {instruction}"
                if not float64:
                    assert not re.match(
                        r"(DADD|DMUL|DFMA|DSETP|DMNMX|DMMA)\b|.*\.F64\b", instruction
                    ), f"{kernel}, {arch}: {instruction}"


def test_instructions_are_counted_with_modifiers_between() -> None:
    counts = cuda_kernels.Counter({"LDG.E.128.SYS": 2, "LDG.E.128.CONSTANT": 1, "LDG.E.64": 5})
    assert count_of(counts, "LDG.E.128") == 3
    assert count_of(counts, "LDG.128") == 3
    assert count_of(counts, "LDG") == 8
    assert count_of(counts, "STG") == 0
    assert count_of(counts, "LDG.128.E") == 0
