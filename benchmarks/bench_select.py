"""Family select beside torch.topk, and beside a matrix product where scores are factors."""

from __future__ import annotations

import torch

import partune.ops  # noqa: F401  (registers the ops)
from conftest import Comparison, copy_bandwidth

TOPK = torch.ops.partune.topk_csr.default
THRESHOLD = torch.ops.partune.threshold_csr.default
FACTORS = torch.ops.partune.topk_csr_factors.default
RANDOM = torch.ops.partune.random_scores.default
N, RANK = 4096, 128
K = N * N // 20


def test_topk_csr_4096(report) -> None:
    scores = torch.randn(N, N)
    functions = {
        "ours": lambda: TOPK(scores, K),
        "torch.topk": lambda: scores.flatten().topk(K, sorted=False).indices.sort(),
        "copy": copy_bandwidth(),
    }
    # Two or three readings: a histogram, the collection, the emission.
    report(Comparison(functions, rounds=7), {"torch.topk": 1.0}, 3 * 4 * N * N)


def test_threshold_csr_4096(report) -> None:
    scores = torch.randn(N, N)
    functions = {
        "ours": lambda: THRESHOLD(scores, 2.0),
        "torch.nonzero": lambda: (scores > 2.0).nonzero(),
        "copy": copy_bandwidth(),
    }
    report(Comparison(functions, rounds=7), {"torch.nonzero": 1.0}, 2 * 4 * N * N)


def test_topk_csr_factors_4096(report) -> None:
    left, right = torch.randn(N, RANK), torch.randn(RANK, N)
    functions = {
        "ours": lambda: FACTORS(left, right, K),
        "product and torch.topk": lambda: (
            (left @ right).abs_().flatten().topk(K, sorted=False).indices.sort()
        ),
        "one product": lambda: left @ right,
    }
    bars = {"product and torch.topk": 1.0, "one product": 0.0}
    report(Comparison(functions, rounds=7), bars)


def test_random_scores_4096(report) -> None:
    seed, step = torch.tensor(1), torch.tensor(2)
    functions = {
        "ours": lambda: RANDOM(N, N, seed=seed, step=step, parameter_id=0),
        "torch.rand": lambda: torch.rand(N, N),
    }
    report(Comparison(functions, rounds=7), {"torch.rand": 1.0})
