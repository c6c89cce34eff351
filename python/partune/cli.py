"""The command `partune`: what this installation can do on this machine, and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import partune
from partune import _native

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")


def collect_info() -> dict[str, Any]:
    """Everything that `partune info` prints."""
    info: dict[str, Any] = {
        "partune": {"version": partune.__version__, "location": str(Path(partune.__file__).parent)},
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "native": _native_facts(),
        "cpu": _cpu_facts(),
        "gpu": _gpu_facts(),
        "ops": _op_facts(),
    }
    info["advice"] = list(_advice(info))
    return info


def _native_facts() -> dict[str, Any]:
    if _native.load_error() is not None:
        return {"error": _native.load_error()}
    build = _core().build_info()
    cuda = build["cuda"]
    return {
        "error": None,
        "version": build["version"],
        "compiler": build["compiler"],
        "cuda": None if cuda is None else _native.format_cuda_version(cuda),
        "cuda_archs": [_arch_name(arch) for arch in build["cuda_archs"].split()],
    }


def _arch_name(arch: str) -> str:
    """CMake's "90-real", "90-virtual" and "90" (both) as "sm_90", "PTX of 90" and "sm_90+PTX"."""
    number, _, kind = arch.partition("-")
    return {"real": f"sm_{number}", "virtual": f"PTX of {number}"}.get(kind, f"sm_{number}+PTX")


def _cpu_facts() -> dict[str, Any]:
    if _native.load_error() is not None:
        return {"isa": None, "best": None, "available": [], "error": None}
    best = _core().best_cpu_isa()
    facts: dict[str, Any] = {"isa": None, "best": best, "error": None}
    facts["frozen_products"] = _frozen_products()
    facts["available"] = ISAS[: ISAS.index(best) + 1]
    try:
        facts["isa"] = _core().cpu_isa()
    except RuntimeError as error:  # PARTUNE_CPU_ISA names what this machine lacks
        facts["error"] = str(error)
    return facts


def _frozen_products() -> str:
    """Who multiplies the float32 weights of frozen layers."""
    from partune.ops.frozen_linear import onednn_is_faster

    return "oneDNN" if onednn_is_faster() and torch.backends.mkldnn.enabled else "torch"


def _gpu_facts() -> dict[str, Any]:
    facts: dict[str, Any] = {"driver": None, "error": None, "devices": []}
    facts["driver_release"] = _driver_release()
    facts["kernels_off_because"] = _native.cuda_status()
    if _native.load_error() is not None or _core().build_info()["cuda"] is None:
        return facts
    probe = _core().cuda_probe()
    facts["driver"] = _native.format_cuda_version(probe["driver"]) if probe["driver"] else None
    facts["error"] = probe["error"] or None
    facts["devices"] = [
        {"name": name, "capability": f"{major}.{minor}", "has_binary": has_binary}
        for name, major, minor, has_binary in probe["devices"]
    ]
    return facts


def _driver_release(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """NVIDIA's number of the driver, such as 580.65.06, or None."""
    try:
        found = re.search(r"NVRM version:.*?\s(\d{3,}(?:\.\d+)+)\s", file.read_text())
    except OSError:
        return None
    return found[1] if found else None


def _op_facts() -> list[dict[str, str]]:
    from partune.ops import _contract

    return [
        {
            "name": op.name,
            "family": op.family,
            "cpu": _backend(op.name, "CPU"),
            "cuda": _backend(op.name, "CUDA"),
            "why": _why(op.name),
        }
        for op in _contract.OPS.values()
    ]


def _backend(op_name: str, key: str) -> str:
    """What the dispatcher would run: "kernel", "reference" or "none"."""
    if _native.load_error() is not None or (key == "CUDA" and torch.version.cuda is None):
        return "none"
    off = key == "CUDA" and _native.cuda_status() is not None
    if off and os.environ.get("PARTUNE_BACKEND") == "cuda":
        return "none"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for kind, wanted in (("kernel", key), ("reference", "CompositeExplicitAutograd")):
        if not (off and kind == "kernel") and has_kernel(f"partune::{op_name}", wanted):
            return kind
    return "none"


def _why(op_name: str) -> str:
    """Why a device is left without a kernel of this op; empty if none is."""
    if _native.load_error() is not None:
        return "no native core"
    if _backend(op_name, "CPU") != "kernel":
        return "this build has no CPU kernel of it"
    if _backend(op_name, "CUDA") != "kernel":
        return _native.cuda_status() or "this build has no CUDA kernel of it"
    return ""


def _core() -> Any:
    """The native core, also where PARTUNE_BACKEND forbids to use it."""
    return _native._core


def _advice(info: dict[str, Any]) -> Iterable[str]:
    """What is missing, and how to get it."""
    native, cpu, gpu = info["native"], info["cpu"], info["gpu"]
    if native["error"] is not None:
        yield (
            f"The native core could not be loaded: {native['error']}. Reinstall partune for this "
            "Python and torch (>= 2.10); in a source tree, run `make build`."
        )
        return
    if native["version"] != info["partune"]["version"]:
        yield (
            f"The native core is of version {native['version']}, not {info['partune']['version']}. "
            "Reinstall partune; in a source tree, run `make build`."
        )
    if cpu["error"] is not None:
        yield f"{cpu['error']}. Unset PARTUNE_CPU_ISA, or name another."
    elif cpu["isa"] != cpu["best"]:
        yield f"PARTUNE_CPU_ISA keeps the CPU kernels at {cpu['isa']}. Unset it for {cpu['best']}."
    if os.environ.get("PARTUNE_BACKEND", "auto") not in ("", "auto"):
        yield _backend_advice()
    if native["cuda"] is None:
        yield "There are no CUDA kernels in this build. Build without PARTUNE_CUDA=0 and ARCHS=cpu."
        return
    if gpu["driver"] is None:
        yield "There is no NVIDIA driver. CUDA kernels need one (>= 580 for CUDA 13) and a GPU."
        return
    if int(gpu["driver"].split(".")[0]) < int(native["cuda"].split(".")[0]):
        yield (
            f"The driver supports CUDA {gpu['driver']}, and this build needs {native['cuda']}. "
            "Update the driver (>= 580 for CUDA 13), or build with CUDA_HOME at an older toolkit."
        )
    elif gpu["error"] is not None:
        yield f"The driver reports no usable GPU: {gpu['error']}."
    elif info["torch"]["cuda"] is None:
        yield "There is a GPU, but this torch was built without CUDA. Install a torch with CUDA."
    for device in gpu["devices"]:
        if not device["has_binary"]:
            major, minor = map(int, device["capability"].split("."))
            fix = _native.how_to_serve([(major, minor)])
            yield f"This build has no binary for {device['name']} (sm_{major}{minor}). {fix}."


def _backend_advice() -> str:
    try:
        _native.require()
    except RuntimeError as error:
        return f"{error}. Unset PARTUNE_BACKEND, or name another."
    return (
        f"PARTUNE_BACKEND={os.environ['PARTUNE_BACKEND']} is set. Unset it to let partune choose."
    )


def format_info(info: dict[str, Any]) -> str:
    """The facts as text for a terminal."""
    native, cpu, gpu = info["native"], info["cpu"], info["gpu"]
    torch_cuda = info["torch"]["cuda"]
    rows = [
        ("partune", f"{info['partune']['version']} in {info['partune']['location']}"),
        ("torch", f"{info['torch']['version']} ({_with_cuda(torch_cuda)})"),
        ("python", f"{info['python']['version']} on {info['python']['platform']}"),
    ]
    if native["error"] is not None:
        rows += [("native core", f"missing: {native['error']}")]
    else:
        archs = " ".join(native["cuda_archs"])
        rows += [
            ("native core", f"compiler {native['compiler']}, {_with_cuda(native['cuda'])}"),
            ("GPU binaries", archs or "none"),
            ("CPU kernels", f"{cpu['isa'] or cpu['error']} (best here: {cpu['best']})"),
            ("CPU products", f"of frozen float32 layers by {cpu['frozen_products']}"),
            ("GPU driver", _driver(gpu)),
        ]
    for device in gpu["devices"]:
        binary = "binary in this build" if device["has_binary"] else "no binary in this build"
        rows.append(("GPU", f"{device['name']}, {device['capability']}, {binary}"))
    rows.append(("CUDA kernels", f"off: {gpu['kernels_off_because']}"))
    if gpu["kernels_off_because"] is None:
        rows[-1] = ("CUDA kernels", "on")
    lines = [f"{name:<14}{value}" for name, value in rows]

    header = {
        "family": "family",
        "name": "op",
        "cpu": "on CPU",
        "cuda": "on CUDA",
        "why": "because",
    }
    table = [header, *info["ops"]]
    widths = {column: 2 + max(len(op[column]) for op in table) for column in header}
    lines.append("")
    for op in table:
        lines.append("".join(f"{op[column]:<{width}}" for column, width in widths.items()).rstrip())
    lines += ["", "kernel: native code; reference: plain torch, right but slow; none: can't run"]
    if info["advice"]:
        lines += ["", "What is missing:", *(f"- {advice}" for advice in info["advice"])]
    return "\n".join(lines)


def _driver(gpu: dict[str, Any]) -> str:
    release = f"{gpu['driver_release']}, " if gpu["driver_release"] else ""
    return f"{release}CUDA {gpu['driver']}" if gpu["driver"] else "none"


def _with_cuda(version: str | None) -> str:
    return "without CUDA" if version is None else f"CUDA {version}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="partune", description=partune.__doc__)
    commands = parser.add_subparsers(required=True)
    info = commands.add_parser(
        "info", help="versions, GPU binaries, CPU instruction set, backend of each op and why"
    )
    info.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    options = parser.parse_args(arguments)
    facts = collect_info()
    print(json.dumps(facts, indent=2) if options.json else format_info(facts))
