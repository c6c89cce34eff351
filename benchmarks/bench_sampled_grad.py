"""Family sampled_grad beside the dense product, and the dense product with its entries gathered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from conftest import Comparison
from partune import ops
from partune.ops.csr import Csr, csr_from_mask, mask_from_csr

OP = torch.ops.partune.sampled_grad_.default


def entries(width: int, density: float) -> Csr:
    return ops.topk_csr(torch.rand(width, width), int(density * width * width))


def blocks(width: int, density: float) -> Csr:
    """As many entries, in blocks of 4 by 4."""
    mask = mask_from_csr(*entries(width // 4, density), width // 4)
    return csr_from_mask(mask.repeat_interleave(4, 0).repeat_interleave(4, 1))


def functions(
    tokens: int, width: int, dtype: torch.dtype, csr: Csr, route: str = "auto"
) -> dict[str, Callable]:
    grad, input = torch.randn(tokens, width).to(dtype), torch.randn(tokens, width).to(dtype)
    crow, col = csr
    flat = torch.repeat_interleave(torch.arange(width), crow.diff()) * width + col
    values = torch.zeros(col.numel())
    return {
        "ours": lambda: ops.sampled_grad_(values, grad, input, crow, col, route=route),
        "sampled": lambda: OP(values, grad, input, crow, col, route="sampled"),
        "panels": lambda: OP(values, grad, input, crow, col, route="panels"),
        "dense": lambda: grad.t() @ input,
        "dense and gather": lambda: values.add_((grad.t() @ input).view(-1)[flat]),
    }


# Tokens, width, dtype, density, bars. With as many rows as columns; entries uniformly spread.
CASES = [
    (2048, 4096, torch.float32, 0.05, {"dense": 5.0}),
    (2048, 1024, torch.float32, 0.05, {"dense": 4.0}),
    (512, 4096, torch.float32, 0.05, {"dense": 6.0}),
    (512, 4096, torch.bfloat16, 0.05, {"dense": 2.0, "dense and gather": 1.0}),
    (2048, 4096, torch.bfloat16, 0.05, {"dense": 2.0, "dense and gather": 1.0}),
    (2048, 1024, torch.bfloat16, 0.05, {"dense and gather": 1.0}),
    (512, 4096, torch.float32, 0.2, {"dense and gather": 1.0}),
    (2048, 1024, torch.float32, 0.2, {"dense and gather": 1.0}),
    (512, 4096, torch.bfloat16, 0.2, {"dense and gather": 1.0}),
    (2048, 1024, torch.bfloat16, 0.2, {"dense and gather": 1.0}),
]


@pytest.mark.parametrize(("tokens", "width", "dtype", "density", "bars"), CASES, ids=str)
def test_sampled_grad_(
    report, tokens: int, width: int, dtype: torch.dtype, density: float, bars: dict[str, float]
) -> None:
    rounds = 5 if tokens * width * width > 2**34 else 9
    ways = functions(tokens, width, dtype, entries(width, density))
    report(Comparison(ways, rounds=rounds), bars, rounds=2)


# Tokens, width, dtype; 5 % of the entries.
BLOCK_CASES = [
    (2048, 4096, torch.float32),
    (2048, 1024, torch.float32),
    (2048, 4096, torch.bfloat16),
    (2048, 1024, torch.bfloat16),
]


@pytest.mark.parametrize(("tokens", "width", "dtype"), BLOCK_CASES, ids=str)
def test_blocks(report, note, tokens: int, width: int, dtype: torch.dtype) -> None:
    """Beside "sampled" on the same CSR; the limit is what a dense product of float32 multiplies."""
    csr, factors = blocks(width, 0.05), torch.randn(2, 1024, 1024)
    ways = functions(tokens, width, dtype, csr, route="blocks")
    ways = {name: ways[name] for name in ("ours", "sampled", "dense")}
    ways["limit"] = lambda: factors[0] @ factors[1]
    comparison = Comparison(ways, rounds=9)
    report(comparison, {"sampled": 1.0, "dense": 1.0}, rounds=2)
    share = comparison.ratio("ours", "limit") * tokens * csr[1].numel() / 1024**3
    note(f"  {share:.2f} of a dense float32 product's multiply-adds per second")
