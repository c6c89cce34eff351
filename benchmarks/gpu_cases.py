"""Every op on a matrix of any size and device: run once for a sanitizer, or timed, as JSON.

python benchmarks/gpu_cases.py --device cuda --size 96 --runs 1
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable

import torch

from partune import ops
from partune.ops.csr import Csr, csr_from_mask, mask_from_csr

DENSITY = 0.05


def block_csr(scores: torch.Tensor) -> Csr:
    """Blocks of 4 by 4, of which scores has one each."""
    chosen = mask_from_csr(*ops.topk_csr(scores, int(DENSITY * scores.numel())), scores.shape[1])
    return csr_from_mask(chosen.repeat_interleave(4, 0).repeat_interleave(4, 1))


def cases(device: str, size: int) -> dict[str, Callable[[], object]]:
    """Calls of each op, and of the peers that their times are read beside."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    scores, other = draw(size, size), draw(size, size)
    k = int(DENSITY * size * size)
    left, right = draw(size, 32), draw(32, size)
    seed, step = torch.tensor(0, device=device), torch.tensor(1, device=device)
    old, new = ops.topk_csr(scores, k), ops.topk_csr(other, k)
    blocks = block_csr(scores[::4, ::4].contiguous())
    values, moved = draw(k), torch.zeros(k, device=device)
    found_inf = torch.zeros((), device=device)
    mask = ops.random_mask(size * size, mask_seed=seed, mask_id=0)
    ranks = ops.mask_ranks(mask, size * size)
    rows = torch.arange(0, size, 2, dtype=torch.int32, device=device)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    halves = {  # by level: what is live, ranks, the state's shape
        "rows": (rows, nothing, (len(rows), size)),
        "columns": (rows, nothing, (size, len(rows))),
        "elements": (nothing.int(), ranks, (int(ranks[-1]),)),
    }
    found: dict[str, Callable[[], object]] = {
        "topk_csr": lambda: ops.topk_csr(scores, k),
        "threshold_csr": lambda: ops.threshold_csr(scores, 1.6),
        "topk_csr_factors": lambda: ops.topk_csr_factors(left, right, k),
        "random_scores": lambda: ops.random_scores(
            size, size, seed=seed, step=step, parameter_id=0
        ),
        "remap_": lambda: ops.remap_([moved], [values], *old, *new),
        "found_inf_": lambda: ops.found_inf_(found_inf, [scores], [old[0]], [old[1]]),
        "random_mask": lambda: ops.random_mask(size * size, mask_seed=seed, mask_id=0),
        "mask_counts": lambda: ops.mask_counts(mask, size * size),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight, grad = draw(size, size, dtype=dtype), draw(size, size, dtype=dtype)
        moments = torch.zeros(2, k, device=device)
        state_step = torch.tensor(5.0, device=device)

        def sparse_step(weight=weight, grad=grad, moments=moments, state_step=state_step):
            ops.sparse_adamw_(
                [weight], [grad], [old[0]], [old[1]], [moments[0]], [moments[1]], [],
                [state_step], [0], lr=torch.tensor(1e-4), beta1=0.9, beta2=0.95,
                weight_decay=0.01, eps=1e-6, eps_mode="corrected", maximize=False,
                rounding="stochastic", seed=seed,
            )  # fmt: skip

        def half_step(level, live, ranks, half_moments, weight=weight, grad=grad, step=state_step):
            ops.half_adamw_(
                [weight], [grad], [live], [ranks], [half_moments[0]], [half_moments[1]], [], [step],
                [0], [0], level=level, mask_seed=seed, lr=torch.tensor(1e-4), beta1=0.9,
                beta2=0.95, weight_decay=0.01, eps=1e-8, rounding="stochastic", seed=seed,
            )  # fmt: skip

        for level, (live, half_ranks, shape) in halves.items():
            half_moments = torch.zeros(2, *shape, device=device)
            found[f"half_adamw_ {level} {str(dtype).removeprefix('torch.')}"] = functools.partial(
                half_step, level, live, half_ranks, half_moments
            )
        x, output_grad = draw(2 * size, size, dtype=dtype), draw(2 * size, size, dtype=dtype)

        def sampled(route, csr, selected, x=x, output_grad=output_grad):
            ops.sampled_grad_(selected, output_grad, x, *csr, route=route)

        def dense(x=x, output_grad=output_grad):
            return output_grad.t() @ x

        for route, selection in (("sampled", old), ("panels", old), ("blocks", blocks)):
            case_name = f"sampled_grad_ {route} {str(dtype).removeprefix('torch.')}"
            selected = torch.zeros(selection[1].numel(), device=device)
            found[case_name] = functools.partial(sampled, route, selection, selected)
        found[f"peer: dense product {str(dtype).removeprefix('torch.')}"] = dense
        parameter = torch.nn.Parameter(weight.clone())
        parameter.grad = grad
        name = str(dtype).removeprefix("torch.")
        found[f"sparse_adamw_ {name}"] = sparse_step
        csr = [old[0]], [old[1]]
        found[f"scatter_csr_ {name}"] = functools.partial(
            ops.scatter_csr_, [weight], [values], *csr
        )
        found[f"gather_csr_ {name}"] = functools.partial(ops.gather_csr_, [moved], [weight], *csr)
        found[f"peer: torch's AdamW {name}"] = torch.optim.AdamW([parameter], fused=True).step
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found |= scale_shift_cases(draw, size, str(dtype).removeprefix("torch."), dtype)
        found |= block_lora_cases(draw, size, str(dtype).removeprefix("torch."), dtype)
    target = torch.empty_like(scores)
    found["peer: copy float32"] = lambda: target.copy_(scores)
    return found


def scale_shift_cases(
    draw: Callable[..., torch.Tensor], size: int, name: str, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Sites of family scale_shift, each forward and backward, and plain torch's."""
    planes = draw(2, 5, size, size // 4 + 1, dtype=dtype)
    x, grad = draw(size, size, dtype=dtype), draw(size, size, dtype=dtype)
    scale, shift, weight, bias = (draw(size, dtype=dtype) for _ in range(4))
    pair = scale.abs() + 1, shift

    def plain() -> None:
        y = ops.scale_shift(x, *pair)
        ops.scale_shift_backward(grad, y, *pair, from_output=True)

    def channels_first() -> None:
        ops.scale_shift_(planes, scale[:5], channel_dim=1)
        ops.scale_shift_backward(planes, planes, scale[:5], channel_dim=1)

    def gelu(activation: str) -> None:
        ops.scale_shift(x, *pair, bias=bias, activation=activation)
        ops.scale_shift_backward(grad, x, *pair, bias, activation=activation)

    def layer_norm() -> None:
        _, mean, rstd = torch.ops.partune.layer_norm_scale_shift(x, weight, bias, *pair, eps=1e-6)
        ops.layer_norm_scale_shift_backward(grad, x, mean, rstd, weight, bias, scale)

    def rms_norm() -> None:
        _, rstd = torch.ops.partune.rms_norm_scale_shift(x, weight, *pair, eps=1e-6)
        ops.rms_norm_scale_shift_backward(grad, x, rstd, weight, scale)

    leaves = [value.clone().requires_grad_() for value in (x, *pair)]

    def peer() -> None:
        torch.autograd.grad(leaves[0] * leaves[1] + leaves[2], leaves, grad)

    return {
        f"scale_shift {name}": plain,
        f"scale_shift channels first {name}": channels_first,
        f"scale_shift gelu {name}": lambda: gelu("gelu"),
        f"scale_shift gelu_tanh {name}": lambda: gelu("gelu_tanh"),
        f"layer_norm_scale_shift {name}": layer_norm,
        f"rms_norm_scale_shift {name}": rms_norm,
        f"peer: torch's scale and shift {name}": peer,
    }


def block_lora_cases(
    draw: Callable[..., torch.Tensor], size: int, name: str, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """A layer of family block_lora, forward and backward, and torch's frozen one."""
    x, grad = draw(size, size, dtype=dtype).requires_grad_(), draw(size, size, dtype=dtype)
    weight, rank = draw(size, size, dtype=dtype), 16
    seed = torch.tensor(0, device=x.device)

    adapters = {
        "input": (draw(rank, size // 2), draw(size, rank)),
        "rank": (draw(rank // 2, size), draw(2, size, rank // 2)),
    }

    def step(share: str, dropout: float) -> None:
        down, up = (adapter.requires_grad_() for adapter in adapters[share])
        (y,) = ops.block_lora_linear(
            x, [weight], [None], [down], [up], scales=[1.0], share=share, dropout=dropout,
            seed=seed, step=seed,
        )  # fmt: skip
        torch.autograd.grad(y, [x, down, up], grad)

    def peer() -> None:
        torch.autograd.grad(torch.nn.functional.linear(x, weight), x, grad)

    return {
        f"block_lora {name}": lambda: step("input", 0.0),
        f"block_lora shared rank {name}": lambda: step("rank", 0.0),
        f"block_lora dropout {name}": lambda: step("input", 0.05),
        f"peer: torch's frozen linear {name}": peer,
    }


def milliseconds(function: Callable[[], object], device: str, runs: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=21)
    options = parser.parse_args()
    figures = {}
    for name, function in cases(options.device, options.size).items():
        milliseconds(function, options.device, 1)  # the first call is not like the others
        figures[name] = milliseconds(function, options.device, options.runs)
    print(json.dumps({"size": options.size, "milliseconds": figures}))


if __name__ == "__main__":
    main()
