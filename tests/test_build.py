"""The build's own promises: architectures, instruction sets kept apart, pinned versions."""

import importlib.machinery
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

import partune
from partune import _native

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "native" / "CMakeFiles"
X86_ISAS = ("baseline", "avx2", "avx512")


@pytest.fixture
def setup_script(monkeypatch):
    """What setup.py defines, and what it passes to setuptools.setup."""
    passed = {}
    monkeypatch.setattr(setuptools, "setup", passed.update)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py"), passed


@pytest.mark.parametrize(
    ("torch_list", "cmake_list"),
    [
        ("8.0", "80-real"),
        ("7.5;8.6 9.0,10.0", "75-real;86-real;90-real;100-real"),
        ("9.0a 12.0+PTX", "90a-real;120"),
        ("10.0f", "100f-real"),
        ("", ""),
    ],
)
def test_architectures_are_spelled_as_in_torch(setup_script, torch_list, cmake_list):
    assert setup_script[0]["cuda_archs"](torch_list) == cmake_list


@pytest.mark.parametrize("entry", ["90", "9", "sm_90", "Hopper", "9.0b", "9.0+ptx", "-9.0"])
def test_an_architecture_that_is_none_is_named(setup_script, entry):
    with pytest.raises(SystemExit, match=re.escape(f"holds '{entry}'")):
        setup_script[0]["cuda_archs"](f"8.0 {entry}")


def test_cuda_can_be_left_out(setup_script, monkeypatch):
    monkeypatch.setenv("PARTUNE_CUDA", "0")
    assert setup_script[0]["cuda_options"]() == ["-DPARTUNE_CUDA=OFF"]


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
    registers = {"baseline": r"%[yz]mm", "avx2": r"%zmm|%k[0-7]\b", "avx512": r"$^"}[isa]
    code = _output("objdump", "-d", "--no-show-raw-insn", *objects)
    assert "%xmm" in code
    assert not re.search(registers, code)


def _output(*command):
    if shutil.which(str(command[0])) is None:
        pytest.fail(f"{command[0]} is missing; it comes with the compiler")
    run = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
    return run.stdout


def _module_path():
    return Path(_native.require().__file__)


def _nvidia_folder():
    return importlib.machinery.PathFinder.find_spec("nvidia").submodule_search_locations[0]
