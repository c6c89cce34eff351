"""Finds the CUDA compiler and the list of architectures, runs CMake, names the wheel.

Environment:
  PARTUNE_CUDA=0        the CPU part alone
  TORCH_CUDA_ARCH_LIST  architectures, as torch spells them ("8.0;9.0a+PTX")
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
ALL_ARCHS = "75-real;80-real;86-real;89-real;90-real;100-real;120"


def cuda_archs(torch_arch_list: str) -> str:
    """CMake's spelling of an architecture list in torch's ("8.0;9.0a+PTX" -> "80-real;90a")."""
    archs = []
    for entry in torch_arch_list.replace(",", " ").replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(
                f"partune: TORCH_CUDA_ARCH_LIST holds '{entry}'; "
                "expected entries such as 8.0, 9.0a or 12.0+PTX"
            )
        major, minor, suffix, ptx = match.groups()
        archs.append(f"{major}{minor}{suffix}" + ("" if ptx else "-real"))
    return ";".join(archs)


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


def cuda_options() -> list[str]:
    if os.environ.get("PARTUNE_CUDA", "1") == "0" or not sys.platform.startswith("linux"):
        return ["-DPARTUNE_CUDA=OFF"]
    home = toolkit()
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST")
    return [
        "-DPARTUNE_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={home / 'bin' / 'nvcc'}",
        f"-DCMAKE_CUDA_ARCHITECTURES={cuda_archs(archs) if archs else ALL_ARCHS}",
        # The compiler packages keep libraries in lib, where nvcc looks in lib64.
        f"-DCMAKE_CUDA_FLAGS=-L{home / 'lib'}",
    ]


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
            f"-DPARTUNE_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'module'}",
            *cuda_options(),
        ]
        subprocess.run(configure, check=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run(["cmake", "--build", str(build), *jobs], check=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "module" / output.name, output)


setup(
    version=VERSION,
    ext_modules=[Extension("partune._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
