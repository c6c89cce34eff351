"""`partune info`, and the loading of the native core that it reports on."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import partune
from partune import _native, cli

GPU = ("NVIDIA H100", 9, 0, True)
OLD_GPU = ("Tesla V100", 7, 0, False)
NEW_GPU = ("B300", 10, 3, False)


class FakeCore:
    """A native core on a machine of our choice."""

    def __init__(self, cuda=13000, driver=13000, devices=(), error="", best="avx2"):
        self.cuda, self.devices = cuda, list(devices)
        self.probe = {"driver": driver, "error": error, "devices": self.devices}
        self.best = best
        self.registered = self.probed = 0

    def schemas(self):
        return []

    def build_info(self):
        archs = "90-real 120" if self.cuda else ""
        version = partune.__version__
        return {"version": version, "compiler": "12.2.0", "cuda": self.cuda, "cuda_archs": archs}

    def cpu_isa(self):
        return self.best

    def best_cpu_isa(self):
        return self.best

    def cuda_probe(self):
        self.probed += 1
        return self.probe

    def register_cuda(self):
        self.registered += 1


@pytest.fixture
def load_native(monkeypatch):
    """Loads a second copy of partune._native beside a core, or beside none."""

    def load(core, backend=None, torch_cuda="13.0"):
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        if backend is None:
            monkeypatch.delenv("PARTUNE_BACKEND", raising=False)
        else:
            monkeypatch.setenv("PARTUNE_BACKEND", backend)
        # None in sys.modules makes the import fail, as a missing or broken file does.
        monkeypatch.setitem(sys.modules, "partune._C", core)
        monkeypatch.delattr(partune, "_C", raising=False)
        if core is not None:
            monkeypatch.setattr(partune, "_C", core, raising=False)
        spec = importlib.util.spec_from_file_location("native_copy", _native.__file__)
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        return native

    return load


@pytest.fixture
def info_of(load_native, monkeypatch):
    """What `partune info --json` finds with such a core."""

    def info(*args, **kwargs):
        monkeypatch.setattr(cli, "_native", load_native(*args, **kwargs))
        facts = cli.collect_info()
        assert cli.format_info(facts)
        return json.loads(json.dumps(facts))

    return info


@pytest.mark.parametrize("backend", [None, "", "auto", "cuda"])
def test_cuda_kernels_are_registered_once_where_they_can_run(load_native, backend):
    core = FakeCore(devices=[OLD_GPU, GPU])
    native = load_native(core, backend)
    assert native.require() is core
    assert core.probed == core.registered == 0, "nothing looks for a GPU at import"
    assert native.cuda_status() is native.cuda_status() is None
    assert core.probed == 1
    assert native.require() is native.require() is core
    assert core.registered == 1


@pytest.mark.parametrize(
    ("core", "torch_cuda", "reason"),
    [
        (FakeCore(devices=[GPU]), None, "built without CUDA"),
        (FakeCore(cuda=None, devices=[GPU]), "13.0", "PARTUNE_CUDA=0"),
        (FakeCore(driver=0, error="no driver"), "13.0", "no driver"),
        (FakeCore(), "13.0", "none found"),
        (
            FakeCore(driver=12080, error="insufficient"),
            "13.0",
            r"supports CUDA 12.8, .* needs 13.0. Update the driver \(580",
        ),
        (
            FakeCore(devices=[OLD_GPU]),
            "13.0",
            r"no binary for Tesla V100 \(sm_70\).*sm_75 and later",
        ),
        (
            FakeCore(devices=[NEW_GPU]),
            "13.0",
            r"no binary for B300 \(sm_103\).*make wheel ARCHS=\"103\".*_LIST=\"10.3\" pip",
        ),
    ],
)
def test_cuda_kernels_stay_off_with_a_reason(load_native, core, torch_cuda, reason):
    native = load_native(core, None, torch_cuda)
    assert re.search(reason, native.cuda_status())
    assert native.require() is core
    assert core.registered == 0


def test_a_torch_without_cuda_is_not_made_to_look_for_a_gpu(load_native):
    core = FakeCore(devices=[GPU])
    load_native(core, None, None)
    assert core.probed == 0


def test_the_reference_can_be_asked_for(load_native):
    core = FakeCore(devices=[GPU])
    native = load_native(core, "reference")
    assert "PARTUNE_BACKEND=reference" in native.cuda_status()
    assert native.require() is core
    assert core.registered == core.probed == 0


@pytest.mark.parametrize(
    ("backend", "torch_cuda", "reason"),
    [("cuda", None, "can't run"), ("opencl", "13.0", "one of auto"), ("opencl", None, "one of")],
)
def test_a_backend_that_is_never_there_is_an_error_at_every_use(
    load_native, backend, torch_cuda, reason
):
    core = FakeCore(devices=[GPU])
    native = load_native(core, backend, torch_cuda)
    with pytest.raises(RuntimeError, match=f"PARTUNE_BACKEND.*{reason}"):
        native.require()
    assert f"PARTUNE_BACKEND={backend}"[:15] in native.cuda_status()


def test_a_backend_that_this_machine_lacks_is_an_error_on_cuda_tensors(load_native):
    core = FakeCore(devices=[OLD_GPU])
    native = load_native(core, "cuda")
    assert native.require() is core, "tensors on the CPU are not concerned"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"PARTUNE_BACKEND=cuda, but .*no binary"):
            native._settle()
    assert "no binary" in native.cuda_status()
    assert core.registered == 0


def test_the_fallback_is_told_once(load_native):
    native = load_native(FakeCore(devices=[NEW_GPU]))
    with pytest.warns(UserWarning, match=r'for B300 .*ARCHS="103".*plain-torch reference') as told:
        native._settle()
        native._settle()
    assert len(told) == 1


ADD_ONE = """
import torch, warnings
from partune._native import StandIns
warnings.simplefilter("error")
library = torch.library.Library("stand_in_test", "DEF")
library.define("add_(Tensor(a!) x, *, int n) -> Tensor(a!)")
library.impl("add_", lambda x, *, n: x.sub_(n), "CompositeExplicitAutograd")  # the "reference"
add = torch.ops.stand_in_test.add_.default
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
def call():
    return add.redispatch(CUDA, torch.zeros(2), n=3).tolist()
def has():
    return torch._C._dispatch_has_kernel_for_dispatch_key("stand_in_test::add_", "CUDA")
"""


@pytest.mark.parametrize(
    "program",
    [
        # The native kernel takes over in the first call, and no later one comes by.
        """
settled = []
def settle():
    settled.append(1)
    stand_ins.step_aside()
    late.impl("add_", lambda x, *, n: x.add_(n), "CUDA")
late = torch.library.Library("stand_in_test", "FRAGMENT")
stand_ins = StandIns("stand_in_test", ["add_"], "CUDA", settle)
assert has() and not settled
assert [call(), call()] == [[3, 3], [3, 3]] and settled == [1] and has()
""",
        # Without one the reference does.
        """
settle = lambda: stand_ins.step_aside()
stand_ins = StandIns("stand_in_test", ["add_"], "CUDA", settle)
assert call() == [-3, -3] and not has() and call() == [-3, -3]
""",
        # A settling that raises is the call's error, and is tried again.
        """
def settle():
    if not again: raise RuntimeError("none here")
    stand_ins.step_aside()
again = False
stand_ins = StandIns("stand_in_test", ["add_"], "CUDA", settle)
for _ in range(2):
    try: call(); raise SystemExit("no error")
    except RuntimeError as error: assert "none here" in str(error)
again = True
assert call() == [-3, -3]
""",
        # Threads that meet in the first call all get their result.
        """
import threading, time
lock, left = threading.Lock(), [1]
def settle():
    with lock:
        if left:
            time.sleep(0.2)
            left.pop()
            stand_ins.step_aside()
stand_ins = StandIns("stand_in_test", ["add_"], "CUDA", settle)
results = []
threads = [threading.Thread(target=lambda: results.append(call())) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert results == [[-3, -3]] * 8 and not has()
""",
    ],
    ids=["native", "reference", "raises", "threads"],
)
def test_stand_ins_step_aside_in_the_first_call(program):
    output(sys.executable, "-c", ADD_ONE + program)


NO_DRIVER_AT_IMPORT = """
import os, torch, warnings
torch.version.cuda = "13.0"
import partune.optim
from partune import _native, ops
loaded = os.path.exists(os.environ["LOADED"])
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
scores = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
ops.topk_csr(scores, 2)
assert not loaded and not os.path.exists(os.environ["LOADED"]), "CUDA was initialised"
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(2):
        found = torch.ops.partune.topk_csr.default.redispatch(CUDA, scores, 2)
        assert found[1].tolist() == [1, 0]
assert os.path.exists(os.environ["LOADED"]), "this test can't tell"
assert len(told) == 1 and "reference" in str(told[0].message), told
assert _native.cuda_status()
_native.require().register_cuda()
assert torch._C._dispatch_has_kernel_for_dispatch_key("partune::sparse_adamw_", "CUDA")
"""


@pytest.mark.skipif(
    _native.require().build_info()["cuda"] is None, reason="built with PARTUNE_CUDA=0"
)
def test_the_driver_is_not_loaded_before_the_first_cuda_tensor(tmp_path):
    source = tmp_path / "driver.c"
    source.write_text(
        "#include <stdio.h>\n#include <stdlib.h>\n__attribute__((constructor)) static void "
        'loaded(void) { fclose(fopen(getenv("LOADED"), "w")); }\n'
    )
    library = tmp_path / "libcuda.so.1"
    output("cc", "-shared", "-fPIC", str(source), "-o", str(library))
    variables = {"LD_LIBRARY_PATH": str(tmp_path), "LOADED": str(tmp_path / "loaded")}
    environment = {key: value for key, value in os.environ.items() if key != "PARTUNE_BACKEND"}
    output(sys.executable, "-c", NO_DRIVER_AT_IMPORT, env=environment | variables)


def test_without_the_core_the_reason_is_told_at_first_use(load_native):
    native = load_native(None)
    assert native.load_error()
    assert native.cuda_status()
    with pytest.raises(RuntimeError, match=r"could not be loaded .*partune info"):
        native.require()


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


def test_the_import_takes_little_beyond_torch():
    code = "import time, torch; start = time.perf_counter(); import partune, partune.optim; "
    code += "print(time.perf_counter() - start)"
    times = sorted(float(output(sys.executable, "-c", code)) for _ in range(5))
    assert times[2] <= 0.3, f"seconds: {times}"


def output(*command, env=None):
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit):
        cli.main([])
    assert "info" in capsys.readouterr().err
