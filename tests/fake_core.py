"""Native cores on machines of our choice, and programs that run beside."""

from __future__ import annotations

import subprocess

import partune

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


def output(*command, env=None):
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
