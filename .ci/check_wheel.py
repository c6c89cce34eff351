"""An installed wheel, away from the source tree: imports, steps and changes what it selected.

With the wheel's path and the version that its name must tell as arguments, checks these too.
"""

import importlib.metadata
import platform
import sys
from pathlib import Path

import torch

import partune
from partune.optim import LiftAdamW, lift_groups

if len(sys.argv) > 1:
    wheel, local = Path(sys.argv[1]), sys.argv[2]
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    version = f"{partune.__version__}+{local}"
    platforms = f"manylinux_2_28_{platform.machine()}"
    assert wheel.name == f"partune-{version}-{python}-{python}-{platforms}.whl", wheel.name
    assert importlib.metadata.version("partune") == version
    size = wheel.stat().st_size / 1e6
    assert size <= 5, f"{wheel.name} has {size:.1f} MB, and 5 are enough"
    print(f"{wheel.name}: {size:.2f} MB")

assert Path(partune.__file__).is_relative_to(sys.prefix), f"not the wheel: {partune.__file__}"

torch.manual_seed(0)
model = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(64, 96), "head": torch.nn.Linear(96, 8)})
before = {name: p.detach().clone() for name, p in model.named_parameters()}
optimizer = LiftAdamW(lift_groups(model), lr=1e-2, rank=8)
model["head"](model["up_proj"](torch.randn(16, 64))).square().mean().backward()
optimizer.step()

weight = model["up_proj"].weight
changed = weight != before.pop("up_proj.weight")
assert torch.equal(changed, optimizer.selected(weight)), "other entries changed than were selected"
assert changed.sum() == int(0.05 * weight.numel())
assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
print(f"{partune.__file__}: LiftAdamW changed {int(changed.sum())} of {weight.numel()} weights")
