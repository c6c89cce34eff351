"""The loading of the native core, and of its CUDA kernels in the first call."""

import os
import re
import sys

import pytest

from fake_core import GPU, NEW_GPU, OLD_GPU, FakeCore, output
from partune import _native


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


def test_the_import_takes_little_beyond_torch():
    code = "import time, torch; start = time.perf_counter(); import partune, partune.optim; "
    code += "print(time.perf_counter() - start)"
    times = sorted(float(output(sys.executable, "-c", code)) for _ in range(5))
    assert times[2] <= 0.3, f"seconds: {times}"
