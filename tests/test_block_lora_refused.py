"""Family block_lora as layers use it: what is refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partune import ops

GOOD = {
    "input": torch.ones(2, 4),
    "weights": [torch.ones(3, 4)],
    "biases": [torch.ones(3)],
    "downs": [torch.ones(2, 2)],
    "ups": [torch.ones(3, 2)],
    "scales": [1.0],
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": 1.0}, TypeError, "input: got float, want a tensor"),
        ({"input": torch.ones(2, 4).int()}, TypeError, "input: got dtype int32"),
        ({"input": torch.tensor(1.0)}, ValueError, "input: got a 0-d tensor"),
        ({"input": torch.ones(2, 4).half()}, TypeError, r"weights\[0\]: got dtype torch.float32"),
        ({"weights": torch.ones(3, 4)}, TypeError, "weights: got Tensor, want a list"),
        ({"weights": [torch.ones(3, 5)]}, ValueError, r"weights\[0\]: got shape \(3, 5\)"),
        (
            {"weights": [torch.ones(3, 4, requires_grad=True)]},
            ValueError,
            r"weights\[0\]: it requires grad, want a frozen weight: call requires_grad_\(False\)",
        ),
        ({"biases": []}, ValueError, "biases: got 0 entries, want 1, one per member"),
        ({"biases": [torch.ones(4)]}, ValueError, r"biases\[0\]: got shape \(4,\), want \(3,\)"),
        ({"biases": [torch.ones(3).double()]}, TypeError, r"biases\[0\]: got dtype torch.float64"),
        ({"downs": [torch.ones(2, 3)]}, ValueError, "the number of blocks must divide"),
        ({"ups": []}, ValueError, "ups: got 0 entries, want 1"),
        ({"ups": [torch.ones(2)]}, ValueError, r"ups\[0\]: got shape \(2,\), want \(out, 2\)"),
        ({"scales": [1.0, 2.0]}, ValueError, "scales: got 2 entries, want 1"),
        ({"dropout": 1.5}, ValueError, "dropout: got 1.5, want 0 <= dropout < 1"),
        ({"dropout": 0.1, "seed": 3}, TypeError, "seed: got int, want a tensor"),
        ({"layer_id": -1}, ValueError, "layer_id: got -1"),
        ({"share": "none"}, ValueError, "share: got 'none', want 'input' or 'rank'"),
    ],
)
def test_what_the_linear_refuses(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    ops.block_lora_linear(**GOOD)
    with pytest.raises(error, match=message):
        ops.block_lora_linear(**{**GOOD, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bases": []}, ValueError, "bases: got 0 entries, want 1, one per member"),
        ({"bases": [torch.ones(2, 3).int()]}, TypeError, r"bases\[0\]: got dtype int32"),
        ({"bases": [torch.ones(2, 4)]}, ValueError, r"bases\[0\]: got shape \(2, 4\), want"),
        (
            {
                "bases": [torch.ones(2, 3), torch.ones(2, 3).double()],
                "downs": 2 * GOOD["downs"],
                "ups": 2 * GOOD["ups"],
                "scales": [1.0, 1.0],
            },
            TypeError,
            r"bases\[1\]: got dtype torch.float64 beside torch.float32",
        ),
        (
            {"bases": [torch.ones(3, 2).t()], "inplace": True},
            ValueError,
            r"bases\[0\]: got strides \(1, 2\)",
        ),
        (
            {"bases": [torch.ones(2, 3, requires_grad=True)], "inplace": True},
            ValueError,
            "inplace: got True for a leaf",
        ),
        ({"input": None}, TypeError, "input: got NoneType"),
        ({"scales": []}, ValueError, "scales: got 0 entries, want 1"),
    ],
)
def test_what_adding_to_bases_refuses(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = {name: GOOD[name] for name in ("input", "downs", "ups", "scales")}
    good["bases"] = [torch.ones(2, 3)]
    ops.block_lora(**good)
    with pytest.raises(error, match=message):
        ops.block_lora(**{**good, **arguments})
