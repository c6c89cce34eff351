"""`make gpu-check`: all that needs a GPU, each step recorded, into one JSON for an issue.

Python's own library is all that it needs; the steps run in .venv. With .venv made, no network.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TAIL = 4000  # characters of a failed step's output that the report keeps
Command = list[str]
Run = Callable[[Command, dict[str, str]], "tuple[int, str]"]


class Missing(Exception):
    """What this machine lacks."""


def run(command: Command, variables: dict[str, str]) -> tuple[int, str]:
    """Run in the source tree; the exit status and all output, shown meanwhile."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **variables}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def find_gpus() -> list[str]:
    """Name, compute capability and driver of each GPU, or Missing."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        raise Missing("an NVIDIA driver: there is no nvidia-smi on the PATH")
    query = [smi, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    gpus = answer.stdout.strip().splitlines()
    if answer.returncode != 0 or not gpus:
        said = (answer.stdout + answer.stderr).strip() or "nothing"
        raise Missing(f"an NVIDIA GPU: nvidia-smi finds none (it says: {said})")
    return gpus


def check_torch(folder: Path = BIN) -> None:
    """Missing unless the torch of .venv, where there is one yet, can use the GPU."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    if not (folder / "python").exists():
        return
    answer = subprocess.run([folder / "python", "-c", code], capture_output=True, text=True)
    if answer.returncode != 0 and "No module named 'torch'" in answer.stderr:
        return
    words = answer.stdout.split()
    if len(words) != 3 or words[2] != "True":
        version, cuda = [*words, "that can't be imported", "None"][:2]
        built = "without CUDA" if cuda == "None" else f"for CUDA {cuda}, which finds no GPU"
        raise Missing(f"a torch that can use the GPU: .venv has torch {version}, built {built}")


def parse_tests(path: Path) -> dict[str, Any]:
    """Counts and failures of a JUnit file; `on_cuda` counts the tests that ran on the GPU."""
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "on_cuda": 0, "failures": []}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        fault = case.find("failure") if case.find("failure") is not None else case.find("error")
        if case.find("skipped") is not None:
            counts["skipped"] += 1
            continue
        counts["failed" if fault is not None else "passed"] += 1
        counts["on_cuda"] += bool(re.search(r"[\[-]cuda(?!-emulated)[\]-]", name))
        if fault is not None:
            text = f"{fault.get('message') or ''}\n{fault.text or ''}"
            counts["failures"].append({"test": name, "message": text[-TAIL:]})
    return counts


class Report:
    """The steps' outcomes; a step that fails or breaks is recorded, and the next one runs."""

    def __init__(self, gpus: list[str], run: Run = run) -> None:
        self._run = run
        self.data: dict[str, Any] = {
            "format": 1,
            "ok": False,
            "gpus": gpus,
            "machine": {"python": platform.python_version(), "platform": platform.platform()},
            "commit": None,
            "steps": [],
            "partune": None,
            "packages": [],
            "tests": None,
            "sanitizer": {},
            "benchmarks": {},
        }

    def step(
        self, name: str, command: Command, take: Callable[[str], str | None], **variables: str
    ) -> None:
        """Run a command; `take` reads its output into the report and tells what is wrong there."""
        print(f"==== {name}", flush=True)
        start = time.monotonic()
        code, output, problem = None, "", None
        try:
            code, output = self._run(command, variables)
            problem = take(output)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if code:
            problem = f"exit status {code}" + (f"; {problem}" if problem else "")
        step = {"name": name, "ok": problem is None, "seconds": round(time.monotonic() - start, 1)}
        if problem is not None:
            step |= {"problem": problem, "output": output[-TAIL:]}
        self.data["steps"].append(step)
        self.data["ok"] = all(step["ok"] for step in self.data["steps"])

    def all_steps(self, scratch: Path) -> dict[str, Any]:
        python = str(BIN / "python")
        junit, figures = scratch / "tests.xml", scratch / "benchmarks.json"
        self.step("commit", ["git", "describe", "--always", "--dirty"], self._take_commit)
        self.step(
            "build", ["make", ".venv/.gpu", ".venv/.build"], lambda _: None, PARTUNE_ARCHS="native"
        )
        self.step("partune info", [python, "-m", "partune", "info", "--json"], self._take_info)
        packages = "import importlib.metadata as m; import json; print(json.dumps(sorted("
        packages += "f'{d.name}=={d.version}' for d in m.distributions())))"
        self.step("packages", [python, "-c", packages], self._take_packages)
        tests = [python, "-m", "pytest", "-q", "-m", "not slow", f"--junitxml={junit}"]
        self.step("tests", tests, lambda _: self._take_tests(junit))
        cases = [python, "benchmarks/gpu_cases.py", "--device", "cuda"]
        for tool in TOOLS:
            sanitizer = [str(find_sanitizer()), "--tool", tool, "--error-exitcode", "1"]
            self.step(
                f"compute-sanitizer {tool}",
                [*sanitizer, *cases, "--size", "96", "--runs", "1"],
                lambda output, tool=tool: self._take_sanitizer(tool, output),  # type: ignore[misc]
            )
        self.step("timings of the ops", [*cases], self._take_timings)
        self.step(
            "benchmarks",
            [python, "-m", "pytest", "benchmarks", "-q", f"--benchmark-json={figures}"],
            lambda _: self._take_benchmarks(figures),
        )
        return self.data

    def _take_commit(self, output: str) -> None:
        self.data["commit"] = output.strip()

    def _take_info(self, output: str) -> str | None:
        info = self.data["partune"] = json.loads(output[output.index("{") :])
        off = info["gpu"]["kernels_off_because"]
        return f"the CUDA kernels are off: {off}" if off else None

    def _take_packages(self, output: str) -> None:
        self.data["packages"] = json.loads(output)

    def _take_tests(self, junit: Path) -> str | None:
        tests = self.data["tests"] = parse_tests(junit)
        return None if tests["on_cuda"] else "no test ran on cuda"

    def _take_sanitizer(self, tool: str, output: str) -> str | None:
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
        lines = [line for line in output.splitlines() if line.startswith("=========")]
        self.data["sanitizer"][tool] = {"summary": summary, "report": "\n".join(lines)[-TAIL:]}
        return None if summary else "it printed no summary"

    def _take_timings(self, output: str) -> None:
        self.data["benchmarks"]["ops on cuda"] = json.loads(output.splitlines()[-1])

    def _take_benchmarks(self, figures: Path) -> None:
        self.data["benchmarks"]["benchmarks/ on the CPU"] = [
            {"name": b["name"], "median": b["stats"]["median"], **b["extra_info"]}
            for b in json.loads(figures.read_text())["benchmarks"]
        ]


def find_sanitizer() -> Path:
    """compute-sanitizer of .venv, else of the machine."""
    found = sorted(
        (ROOT / ".venv").glob("lib/python3*/site-packages/nvidia/*/bin/compute-sanitizer")
    )
    return found[-1] if found else Path(shutil.which("compute-sanitizer") or "compute-sanitizer")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-check.json")
    options = parser.parse_args(arguments)
    try:
        gpus = find_gpus()
        check_torch()
    except Missing as missing:
        print(f"gpu-check: nothing was run. It needs {missing}.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        report = Report(gpus).all_steps(Path(scratch))
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    failed = [step["name"] for step in report["steps"] if not step["ok"]]
    print(f"{options.output}: {len(report['steps'])} steps, failed: {', '.join(failed) or 'none'}")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
