"""Runs the ops' emulated tests under a sanitizer.

python -m cuda_emulator asan|tsan [pytest's arguments]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_emulator

# More bits of randomness in addresses than this, and ThreadSanitizer finds no room for its own.
TSAN_RANDOM_BITS = 28


def runtime(name: str) -> str:
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, f"-print-file-name=lib{name}.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def surroundings(mode: str) -> tuple[list[str], dict[str, str]]:
    """What a Python that loads this build needs: words before its command line, and variables."""
    variables = {"PARTUNE_EMULATOR": mode, "OMP_NUM_THREADS": "1"}
    if mode == "plain":
        return [], variables
    emulator = str(cuda_emulator.build(mode) / "libemulator.so")
    # The emulator comes before the runtimes whose reports it counts and completes; ASan insists on
    # being the first.
    if mode == "asan":
        variables["LD_PRELOAD"] = f"{runtime('asan')} {emulator}"
        variables["ASAN_OPTIONS"] = "detect_leaks=0"
        return [], variables
    variables["LD_PRELOAD"] = f"{emulator} {runtime('tsan')}"
    variables["TSAN_OPTIONS"] = "exitcode=0"  # the tests ask for the races of their calls
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    crowded = bits.exists() and int(bits.read_text()) > TSAN_RANDOM_BITS
    return ["setarch", "-R"] if crowded else [], variables


def main(mode: str, *arguments: str) -> None:
    prefix, variables = surroundings(mode)
    tests = [str(path) for path in cuda_emulator.SOURCE.parent.glob("test_ops_*.py")]
    command = [*prefix, sys.executable, "-m", "pytest", "-k", "cuda-emulated", *arguments, *tests]
    if mode == "asan":
        command.append("--capture=sys")  # its last words go to the terminal
    os.execvpe(shutil.which(command[0]) or command[0], command, {**os.environ, **variables})


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in cuda_emulator.MODES[1:]:
        sys.exit(__doc__)
    main(*sys.argv[1:])
