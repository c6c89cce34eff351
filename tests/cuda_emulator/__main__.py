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


def main(mode: str, *arguments: str) -> None:
    emulator = str(cuda_emulator.build(mode) / "libemulator.so")
    tests = [str(path) for path in cuda_emulator.SOURCE.parent.glob("test_ops_*.py")]
    command = [sys.executable, "-m", "pytest", "-k", "cuda-emulated", *arguments, *tests]
    environment = {**os.environ, "PARTUNE_EMULATOR": mode, "OMP_NUM_THREADS": "1"}
    # The emulator comes before the runtimes whose reports it counts and completes; ASan insists on
    # being the first.
    if mode == "asan":
        command.append("--capture=sys")  # its last words go to the terminal
        environment["LD_PRELOAD"] = f"{runtime('asan')} {emulator}"
        environment["ASAN_OPTIONS"] = "detect_leaks=0"
    else:
        environment["LD_PRELOAD"] = f"{emulator} {runtime('tsan')}"
        environment["TSAN_OPTIONS"] = "exitcode=0"  # the tests ask for the races of their calls
        bits = Path("/proc/sys/vm/mmap_rnd_bits")
        if bits.exists() and int(bits.read_text()) > TSAN_RANDOM_BITS:
            command = ["setarch", "-R", *command]
    os.execvpe(shutil.which(command[0]) or command[0], command, environment)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in cuda_emulator.MODES[1:]:
        sys.exit(__doc__)
    main(*sys.argv[1:])
