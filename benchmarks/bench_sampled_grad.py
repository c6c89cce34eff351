"""Family sampled_grad beside the dense product, and the dense product with its entries gathered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from conftest import Comparison
from partune import ops

OP = torch.ops.partune.sampled_grad_.default


def functions(tokens: int, width: int, dtype: torch.dtype, density: float) -> dict[str, Callable]:
    grad, input = torch.randn(tokens, width).to(dtype), torch.randn(tokens, width).to(dtype)
    crow, col = ops.topk_csr(torch.rand(width, width), int(density * width * width))
    flat = torch.repeat_interleave(torch.arange(width), crow.diff()) * width + col
    values = torch.zeros(col.numel())
    return {
        "ours": lambda: ops.sampled_grad_(values, grad, input, crow, col),
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
    report(Comparison(functions(tokens, width, dtype, density), rounds=rounds), bars, rounds=2)
