"""Family half_mask and HalfAdamW's step, beside torch's fused AdamW over all and over the half."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from conftest import SHARE_OF_BAR, Comparison, copy_bandwidth
from partune import ops
from partune.optim import HalfAdamW
from partune.selection import Half

STEP = torch.ops.partune.half_adamw_.default
MASK = torch.ops.partune.random_mask.default
COUNTS = torch.ops.partune.mask_counts.default
N = 4096
SMOLLM2 = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576), "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536), "input_layernorm": (576,),
    "post_attention_layernorm": (576,),
}  # fmt: skip


def fused(parameters: list[torch.Tensor]) -> Callable[[], object]:
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    for copy in copies:
        copy.grad = torch.randn_like(copy)
    return torch.optim.AdamW(copies, lr=1e-4, fused=True).step


def note_least(note: Callable[[str], None], label: str, comparison: Comparison) -> None:
    """What the least times say: where other programs run, fused AdamW waits once per parameter."""
    ratio = comparison.least["fused"] / comparison.least["ours"]
    note(f"  {label}: {ratio:.2f}x fused by the least time of each")


def half_step(level: str, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A step of one matrix, and the bytes that it moves."""
    weight, grad = torch.randn(N, N, dtype=dtype), torch.randn(N, N, dtype=dtype)
    nothing = torch.empty(0, dtype=torch.int64)
    seed = torch.tensor(0)
    lines = torch.randperm(N)[: N // 2].sort().values.int()
    live, ranks, shape = lines, nothing, (N // 2, N) if level == "rows" else (N, N // 2)
    if level in ("elements", "stored"):
        mask = ops.random_mask(N * N, mask_seed=seed, mask_id=0)
        ranks = ops.mask_ranks(mask, N * N)
        live, shape = mask if level == "stored" else nothing.int(), (int(ranks[-1]),)
    moments = torch.zeros(2, *shape)
    size = dtype.itemsize
    touched = N * N // 2 if level == "rows" else N * N
    bytes_moved = 3 * size * touched + 16 * moments[0].numel() + 4 * live.numel()
    step = torch.tensor(5.0)

    def run() -> None:
        STEP(
            [weight], [grad], [live], [ranks], [moments[0]], [moments[1]], [], [step], [0], [0],
            level="elements" if level == "stored" else level, mask_seed=seed,
            lr=torch.tensor(1e-4), beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8,
            eps_mode="corrected", maximize=False, rounding="stochastic", seed=seed,
        )  # fmt: skip

    return run, bytes_moved


@pytest.mark.parametrize(
    ("level", "bar"), [("rows", 1.7), ("columns", 0.0), ("elements", 1.0), ("stored", 1.0)]
)
def test_step_4096(report, note, level: str, bar: float) -> None:
    run, bytes_moved = half_step(level, torch.float32)
    functions = {"ours": run, "fused": fused([torch.randn(N, N)]), "copy": copy_bandwidth()}
    comparison = Comparison(functions)
    note_least(note, f"step of {level}", comparison)
    report(comparison, {"fused": bar * SHARE_OF_BAR}, bytes_moved)


@pytest.mark.parametrize("level", ["rows", "elements"])
def test_step_4096_bfloat16(report, level: str) -> None:
    """No bar: the moments are float32, torch's are bfloat16."""
    run, bytes_moved = half_step(level, torch.bfloat16)
    peer = fused([torch.randn(N, N, dtype=torch.bfloat16)])
    functions = {"ours": run, "fused": peer, "copy": copy_bandwidth()}
    report(Comparison(functions), {"fused": 0.0}, bytes_moved)


def smollm2() -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (f"model.layers.{i}.{name}.weight", torch.nn.Parameter(torch.randn(shape)))
        for i in range(30)
        for name, shape in SMOLLM2.items()
    ]


@pytest.mark.parametrize(
    ("level", "bar"), [("category", 1.0), ("rows", 1.7), ("columns", 0.0), ("elements", 1.0)]
)
def test_layers_of_smollm2_through_the_optimizer(report, note, level: str, bar: float) -> None:
    """Whole matrices beside fused AdamW over the same half; finer levels beside it over all."""
    named = smollm2()
    optimizer = HalfAdamW(named, lr=1e-4, plan=Half(seed=0, level=level))
    for _, parameter in named:
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    learning = [parameter for _, parameter in named if parameter.requires_grad]
    functions = {"ours": optimizer.step, "fused": fused(learning), "copy": copy_bandwidth()}
    comparison = Comparison(functions)
    note_least(note, f"layers, {level}", comparison)
    report(comparison, {"fused": bar * SHARE_OF_BAR})


def test_random_mask(report) -> None:
    seed = torch.tensor(0)
    functions = {
        "ours": lambda: MASK(N * N, mask_seed=seed, mask_id=0),
        "torch.randint": lambda: torch.randint(-(2**31), 2**31, (N * N // 32,), dtype=torch.int32),
        "copy": copy_bandwidth(),
    }
    report(Comparison(functions), {"torch.randint": 1.0 * SHARE_OF_BAR}, N * N // 8)


def test_mask_counts(report) -> None:
    mask = ops.random_mask(N * N, mask_seed=torch.tensor(0), mask_id=0)
    bools = torch.rand(N * N) < 0.5
    functions = {
        "ours": lambda: COUNTS(mask, N * N),
        "sum of bools": lambda: bools.view(-1, 1024).sum(1),
        "copy": copy_bandwidth(),
    }
    report(Comparison(functions), {"sum of bools": 1.0 * SHARE_OF_BAR}, N * N // 8)
