"""`partune info`: what this installation can do on this machine, and why."""

import importlib
import json
import sys
from pathlib import Path

import pytest

import partune
from fake_core import GPU, NEW_GPU, OLD_GPU, FakeCore, output
from partune import _native, cli


@pytest.fixture
def info_of(load_native, monkeypatch):
    """What `partune info --json` finds with such a core."""

    def info(*args, **kwargs):
        monkeypatch.setattr(cli, "_native", load_native(*args, **kwargs))
        facts = cli.collect_info()
        assert cli.format_info(facts)
        return json.loads(json.dumps(facts))

    return info


def test_info_without_the_core_says_what_to_do(info_of):
    info = info_of(None)
    assert info["native"]["error"]
    assert {op["cpu"] for op in info["ops"]} == {op["cuda"] for op in info["ops"]} == {"none"}
    assert len(info["advice"]) == 1
    assert "make build" in info["advice"][0]


@pytest.mark.parametrize(
    ("core", "torch_cuda", "advice"),
    [
        (FakeCore(cuda=None), None, "without PARTUNE_CUDA=0 and ARCHS=cpu"),
        (FakeCore(driver=0), None, "no NVIDIA driver"),
        (FakeCore(driver=12080, error="insufficient"), "13.0", "Update the driver"),
        (FakeCore(error="no device"), "13.0", "no usable GPU: no device"),
        (FakeCore(devices=[GPU]), None, "Install a torch with CUDA"),
        (FakeCore(devices=[OLD_GPU]), "13.0", "no build can have one for sm_70"),
        (FakeCore(devices=[NEW_GPU]), "13.0", '`TORCH_CUDA_ARCH_LIST="10.3" pip install .`'),
        (FakeCore(devices=[GPU, NEW_GPU]), "13.0", '`make wheel ARCHS="103"`'),
    ],
)
def test_info_says_what_is_missing_and_how_to_get_it(info_of, core, torch_cuda, advice):
    found = info_of(core, None, torch_cuda)["advice"]
    assert len(found) == 1
    assert advice in found[0]


def test_info_of_a_complete_machine_misses_nothing(info_of):
    info = info_of(FakeCore(devices=[GPU]))
    assert info["advice"] == []
    assert info["native"]["cuda"] == info["gpu"]["driver"] == "13.0"
    assert info["native"]["cuda_archs"] == ["sm_90", "sm_120+PTX"]
    assert info["gpu"]["kernels_off_because"] is None
    assert info["gpu"]["devices"] == [
        {"name": "NVIDIA H100", "capability": "9.0", "has_binary": True}
    ]


@pytest.mark.parametrize("backend", ["reference", "cuda", "opencl"])
def test_info_tells_of_a_backend_that_was_set(info_of, backend):
    assert any("PARTUNE_BACKEND" in advice for advice in info_of(FakeCore(), backend)["advice"])


def test_info_tells_of_an_instruction_set_that_is_not_the_best(info_of):
    core = FakeCore(devices=[GPU])
    core.cpu_isa = lambda: "baseline"
    info = info_of(core)
    assert info["cpu"]["available"] == ["baseline", "avx2"]
    assert "PARTUNE_CPU_ISA keeps the CPU kernels at baseline" in info["advice"][0]


def test_info_survives_an_instruction_set_that_is_not_there(info_of):
    def refuse():
        raise RuntimeError("PARTUNE_CPU_ISA=avx512, but this machine's best is avx2")

    core = FakeCore(devices=[GPU])
    core.cpu_isa = refuse
    assert "this machine's best is avx2" in info_of(core)["advice"][0]


@pytest.mark.parametrize(("faster", "library"), [(True, "oneDNN"), (False, "torch")])
def test_info_tells_who_multiplies_frozen_weights(info_of, monkeypatch, faster, library):
    module = importlib.import_module("partune.ops.frozen_linear")
    monkeypatch.setattr(module, "onednn_is_faster", lambda: faster)
    info = info_of(FakeCore())
    assert info["cpu"]["frozen_products"] == library
    assert f"of frozen float32 layers by {library}" in cli.format_info(info)


def test_columns_of_ops_stand_apart():
    info = cli.collect_info()
    longest = max((op["name"] for op in info["ops"]), key=len)
    (line,) = (line for line in cli.format_info(info).splitlines() if longest in line)
    assert f" {longest}  kernel" in line


def test_every_op_has_a_kernel_on_the_cpu():
    ops = cli.collect_info()["ops"]
    assert ops
    assert {op["cpu"] for op in ops} == {"kernel"}
    schemas = {text.split("(")[0] for _, text in _native.require().schemas()}
    assert {op["name"] for op in ops} == schemas


def test_the_module_prints_text():
    text = output(sys.executable, "-m", "partune", "info")
    assert partune.__version__ in text
    assert "sparse_adamw_" in text


def test_the_command_prints_json():
    facts = json.loads(output(Path(sys.prefix, "bin", "partune"), "info", "--json"))
    assert facts["cpu"]["isa"] in facts["cpu"]["available"]
    assert facts["ops"]


def test_the_release_of_the_driver_is_read(tmp_path):
    file = tmp_path / "version"
    assert cli._driver_release(file) is None
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release")
    assert cli._driver_release(file) == "580.65.06"


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit):
        cli.main([])
    assert "info" in capsys.readouterr().err
