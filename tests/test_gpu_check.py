"""`make gpu-check` on machines of our choice: what it records, and what it asks for."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_cases  # noqa: E402
import gpu_check  # noqa: E402

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_ops_select" name="test_topk[cuda-float32]"/>
<testcase classname="tests.test_ops_select" name="test_topk[cuda-emulated]"/>
<testcase classname="tests.test_ops_select" name="test_topk[cpu]"><skipped message="no"/></testcase>
<testcase classname="tests.test_ops_select" name="test_ties[cuda]">
<failure message="assert 1 == 2">the traceback</failure></testcase>
</testsuite></testsuites>"""
INFO = {"gpu": {"kernels_off_because": None}}
FIGURES = {"benchmarks": [{"name": "step", "stats": {"median": 0.5}, "extra_info": {"AdamW": 2}}]}


def machine(broken=(), info=INFO, junit=JUNIT):
    """A `run` that answers as the commands would; the steps named in `broken` exit with 1."""
    ran = []

    def run(command, variables):
        line = " ".join(map(str, command))
        ran.append((line, variables))
        code = int(any(name in line for name in broken))
        for option, text in (("--junitxml=", junit), ("--benchmark-json=", json.dumps(FIGURES))):
            if (path := line.partition(option)[2]) and not code:
                Path(path).write_text(text)
        if "info --json" in line:
            return code, "a warning\n" + json.dumps(info)
        if "--tool" in line:
            return code, f"noise\n========= ERROR SUMMARY: {7 * code} errors\n"
        if "gpu_cases" in line:
            return code, json.dumps({"size": 4096, "milliseconds": {"topk_csr": 0.1}})
        return code, "[]" if "importlib.metadata" in line else "abc123\n"

    return run, ran


def outcome(tmp_path, **kwargs):
    run, ran = machine(**kwargs)
    report = gpu_check.Report(["NVIDIA H100, 9.0, 580.65"], run).all_steps(tmp_path)
    return json.loads(json.dumps(report)), ran


def test_a_good_run_records_everything(tmp_path):
    junit = JUNIT.replace("<failure", "<system-out").replace("</failure", "</system-out")
    report, ran = outcome(tmp_path, junit=junit)
    assert report["ok"]
    assert report["commit"] == "abc123"
    assert report["gpus"] == ["NVIDIA H100, 9.0, 580.65"]
    assert report["partune"] == INFO
    assert report["tests"] == {"passed": 3, "failed": 0, "skipped": 1, "on_cuda": 2, "failures": []}
    assert set(report["sanitizer"]) == {"memcheck", "racecheck", "initcheck", "synccheck"}
    assert report["sanitizer"]["racecheck"]["summary"] == ["0 errors"]
    assert report["benchmarks"]["ops on cuda"]["milliseconds"] == {"topk_csr": 0.1}
    assert report["benchmarks"]["benchmarks/ on the CPU"][0] == {
        "name": "step", "median": 0.5, "AdamW": 2,
    }  # fmt: skip
    assert {"PARTUNE_ARCHS": "native"} in [variables for _, variables in ran]


@pytest.mark.parametrize(
    ("broken", "failed"),
    [
        ("make", ["build"]),
        ("--tool racecheck", ["compute-sanitizer racecheck"]),
        ("pytest benchmarks", ["benchmarks"]),
        ("--junitxml", ["tests"]),
        ("info --json", ["partune info"]),
    ],
)
def test_a_failing_step_is_recorded_and_the_others_go_on(tmp_path, broken, failed):
    report, ran = outcome(tmp_path, broken=[broken])
    steps = report["steps"]
    assert [step["name"] for step in steps if not step["ok"]] == failed
    assert not report["ok"]
    assert len(steps) == len(ran) == 11
    (step,) = (step for step in steps if not step["ok"])
    assert "exit status 1" in step["problem"]
    assert step["output"]


def test_failures_are_told(tmp_path):
    report, _ = outcome(tmp_path)
    (failure,) = report["tests"]["failures"]
    assert failure["test"] == "tests.test_ops_select::test_ties[cuda]"
    assert "assert 1 == 2" in failure["message"]
    assert "the traceback" in failure["message"]


def test_it_is_no_success_if_the_gpu_did_nothing(tmp_path):
    off = {"gpu": {"kernels_off_because": "no binary"}}
    report, _ = outcome(tmp_path, info=off, junit="<testsuites/>")
    problems = [step.get("problem") for step in report["steps"]]
    assert not report["ok"]
    assert "the CUDA kernels are off: no binary" in problems
    assert "no test ran on cuda" in problems


def test_a_command_that_is_missing_is_a_failed_step(tmp_path):
    report = gpu_check.Report([])
    report.step("absent", [str(tmp_path / "absent")], lambda _: None)
    report.step("present", ["true"], lambda _: None)
    assert [step["ok"] for step in report.data["steps"]] == [False, True]
    assert "FileNotFoundError" in report.data["steps"][0]["problem"]
    assert not report.data["ok"]


def nvidia_smi(folder, text, code=0):
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{text}'\nexit {code}\n")
    program.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("smi", "message"),
    [(None, "no nvidia-smi"), (("No devices were found\\n", 6), "finds none .*No devices")],
)
def test_without_a_gpu_nothing_is_half_done(tmp_path, monkeypatch, capsys, smi, message):
    monkeypatch.setenv("PATH", str(tmp_path) if smi is None else nvidia_smi(tmp_path, *smi))
    output = tmp_path / "report.json"
    assert gpu_check.main(["--output", str(output)]) == 1
    assert not output.exists()
    said = capsys.readouterr().err
    assert said.startswith("gpu-check: nothing was run. It needs an NVIDIA")
    assert re.search(message, said)


def test_a_torch_without_cuda_is_told(tmp_path):
    gpu_check.check_torch(tmp_path / "no .venv yet")
    (tmp_path / "python").write_text("#!/bin/sh\necho 2.13.0+cpu None False\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(gpu_check.Missing, match=r"torch 2\.13\.0\+cpu, built without CUDA"):
        gpu_check.check_torch(tmp_path)
    (tmp_path / "python").write_text("#!/bin/sh\necho 2.13.0 13.0 True\n")
    gpu_check.check_torch(tmp_path)


def test_gpus_are_asked_of_the_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, "NVIDIA L4, 8.9, 580.65\\n"))
    assert gpu_check.find_gpus() == ["NVIDIA L4, 8.9, 580.65"]


class CalledOps(TorchDispatchMode):
    """Names the ops of partune that are called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "partune":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def test_the_cases_call_every_op():
    from partune.ops._contract import OPS

    cases = gpu_cases.cases("cpu", 64)
    with CalledOps() as called:
        for function in cases.values():
            assert gpu_cases.milliseconds(function, "cpu", 2) > 0
    assert called.names == set(OPS)


def test_the_cases_print_json():
    command = [sys.executable, "benchmarks/gpu_cases.py", "--device", "cpu", "--size", "64"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert json.loads(text.splitlines()[-1])["milliseconds"]["topk_csr"] > 0


def test_the_issue_form_asks_for_the_report():
    form = (ROOT / ".github/ISSUE_TEMPLATE/gpu-report.yml").read_text()
    assert "make gpu-check" in form
    assert "gpu-check.json" in form
