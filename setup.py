"""Finds the CUDA compiler and the list of architectures, runs CMake, names the wheel.

Environment:
  PARTUNE_ARCHS         architectures: "90a", "80 90a", native, all (the default) or cpu
  TORCH_CUDA_ARCH_LIST  where that is not set: the same, as torch spells them ("8.0;9.0a+PTX")
  PARTUNE_CUDA=0        the CPU part alone
  CUDA_HOME             a CUDA toolkit to use instead of the compiler packages
  MAX_JOBS              compile jobs at once
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = "0.1.0.dev0"
# Every architecture that CUDA 13 and this project support, and PTX of the newest for those to come.
ALL_ARCHS = "75 80 86 89 90 100 120+PTX"


def cuda_archs(wanted: str, compiled: list[int]) -> list[str]:
    """CMake's spelling of an architecture list in ours or torch's ("9.0a+PTX 80" -> 80-real, 90a).

    `compiled` are those that nvcc knows; from 90 on there is also an "a" of each, from 100 an "f".
    """
    known = {f"{n}{x}": (n, x) for n in compiled for x in ("", "a" * (n >= 90), "f" * (n >= 100))}
    known = dict(sorted((name, key) for name, key in known.items() if key[0] >= 75))
    archs: dict[tuple[int, str], str] = {}
    for entry in filter(None, re.split(r"[\s,;]+", wanted)):
        name = re.sub(r"\.(?=\d[af]?$)", "", entry.removesuffix("+PTX"))
        if name not in known:
            raise SystemExit(
                f"partune: '{entry}' is no architecture that this compiler and partune support: "
                f"{' '.join(sorted(known, key=known.__getitem__))} (or as torch spells them: 8.0, "
                "9.0a, 12.0+PTX), native, all or cpu"
            )
        real = not entry.endswith("+PTX") and archs.get(known[name]) != name
        archs[known[name]] = f"{name}-real" if real else name
    return [archs[key] for key in sorted(archs)]


def wanted_archs() -> str:
    """What the environment asks for, "cpu" or a list of architectures."""
    wanted = os.environ.get("PARTUNE_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or "all"
    if os.environ.get("PARTUNE_CUDA", "1") == "0" or not sys.platform.startswith("linux"):
        return "cpu"
    if wanted.strip() != "native":
        return ALL_ARCHS if wanted.strip() == "all" else wanted.strip()
    smi = shutil.which("nvidia-smi") or "false"
    command = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True).stdout
    if not re.fullmatch(r"(\d+\.\d\s*)+", answer):
        raise SystemExit(
            "partune: architecture 'native', but nvidia-smi tells of no GPU on this machine. "
            'Name the GPU to build for, such as ARCHS="90a", or take ARCHS=all.'
        )
    return answer


def toolkit() -> Path:
    """The CUDA toolkit: CUDA_HOME, else the compiler packages, else what the PATH has."""
    if home := os.environ.get("CUDA_HOME"):
        candidates = [Path(home)]
    else:
        nvidia = importlib.util.find_spec("nvidia")
        folders = nvidia.submodule_search_locations if nvidia else []
        packages = [Path(folder) / "cu13" for folder in folders or []]
        on_path = shutil.which("nvcc")
        candidates = packages + ([Path(on_path).resolve().parent.parent] if on_path else [])
    for candidate in candidates:
        if (candidate / "bin" / "nvcc").exists():
            return candidate
    raise SystemExit(
        "partune: no CUDA compiler found. Build with pip's isolation (its build requirements "
        "bring one), or with `make build`, or set CUDA_HOME, or set PARTUNE_CUDA=0 for the CPU "
        "part alone."
    )


def cuda_build() -> tuple[str, list[str]]:
    """The local version that tells what is inside ("cu130.sm80.sm90a"), and CMake's options."""
    wanted = wanted_archs()
    if wanted == "cpu":
        return "cpu", ["-DPARTUNE_CUDA=OFF"]
    home = toolkit()
    nvcc = home / "bin" / "nvcc"
    facts = [
        subprocess.run([nvcc, option], check=True, capture_output=True, text=True).stdout
        for option in ("--version", "--list-gpu-code")
    ]
    compiled = [int(number) for number in re.findall(r"sm_(\d+)\b", facts[1])]
    archs = cuda_archs(wanted, compiled)
    label = "cu" + "".join(re.search(r"release (\d+)\.(\d+)", facts[0]).groups())
    if archs != cuda_archs(ALL_ARCHS, compiled):
        for name, real, _ in (arch.partition("-") for arch in archs):
            label += f".sm{name}" if real else f".sm{name}.ptx{name}"
    # The compiler packages keep libraries in lib, where nvcc looks in lib64.
    cuda = {"COMPILER": nvcc, "ARCHITECTURES": ";".join(archs), "FLAGS": f"-L{home / 'lib'}"}
    return label, ["-DPARTUNE_CUDA=ON", *(f"-DCMAKE_CUDA_{k}={v}" for k, v in cuda.items())]


class CMakeBuild(build_ext):
    """Builds partune._C with CMake and ninja."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable install goes on where the last one ended; others start anew, because pip's
        # isolated tools lie elsewhere each time.
        again = self.editable_mode
        build = ROOT.resolve() / "build" / "native" if again else Path(self.build_temp).resolve()
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [] if again else ["--fresh"]
        configure += [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_ROOT={Path(torch.__file__).parent}",
            f"-DPARTUNE_VERSION={VERSION}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'module'}",
            *cuda_build()[1],
        ]
        subprocess.run(configure, check=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run(["cmake", "--build", str(build), *jobs], check=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "module" / output.name, output)


setup(
    # An archive of the sources holds nothing built, so its version names nothing either.
    version=VERSION if "sdist" in sys.argv else f"{VERSION}+{cuda_build()[0]}",
    ext_modules=[Extension("partune._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
