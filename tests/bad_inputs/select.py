"""Family select: arguments that its ops take, and what they refuse."""

from collections.abc import Callable

import torch

from bad_inputs.case import Arguments, Bad, both, put

GOOD: dict[str, Callable[[], Arguments]] = {
    "topk_csr": lambda: {"scores": torch.randn(3, 4), "k": 5, "largest": True},
    "threshold_csr": lambda: {"scores": torch.randn(3, 4), "threshold": 0.5, "largest": True},
    "topk_csr_factors": lambda: {"left": torch.randn(3, 2), "right": torch.randn(2, 4), "k": 5},
    "random_scores": lambda: {
        "rows": 3,
        "columns": 4,
        "seed": torch.tensor(1),
        "step": torch.tensor(2),
        "parameter_id": 0,
    },
}  # fmt: skip

BAD: dict[str, list[Bad]] = {
    "topk_csr": [
        Bad("scores no tensor", put("scores", [1.0]), TypeError, "scores: got list"),
        Bad("integer scores", put("scores", torch.zeros(3, 4, dtype=torch.int64)), TypeError,
            "scores: got dtype int64"),
        Bad("vector", put("scores", torch.zeros(12)), ValueError,
            r"scores: got shape \(12,\), want a matrix"),
        Bad("negative k", put("k", -1), ValueError, "k: got -1, want 0 <= k <= 12"),
        Bad("k too large", put("k", 13), ValueError, "k: got 13, want 0 <= k <= 12"),
        Bad("fractional k", put("k", 2.5), TypeError, "k: got float, want an int"),
    ],
    "threshold_csr": [
        Bad("vector", put("scores", torch.zeros(12)), ValueError, "want a matrix"),
        Bad("integer scores", put("scores", torch.zeros(3, 4, dtype=torch.int64)), TypeError,
            "scores: got dtype int64"),
        Bad("NaN", put("threshold", float("nan")), ValueError, "threshold: got NaN", native=False),
    ],
    "topk_csr_factors": [
        Bad("half factors", both(put("left", torch.zeros(3, 2).half()),
                                 put("right", torch.zeros(2, 4).half())), TypeError,
            "left: got dtype float16, want float32 or float64"),
        Bad("two dtypes", put("right", torch.zeros(2, 4).double()), TypeError,
            "right: got dtype float64, want float32"),
        Bad("factors that do not fit", put("right", torch.zeros(3, 4)), ValueError,
            r"right: got shape \(3, 4\) beside left \(3, 2\)"),
        Bad("vector", put("left", torch.zeros(6)), ValueError, "left: got shape"),
        Bad("k too large", put("k", 13), ValueError, "k: got 13"),
        Bad("negative k", put("k", -1), ValueError, "k: got -1"),
    ],
    "random_scores": [
        Bad("negative rows", put("rows", -1), ValueError, "rows: got -1"),
        Bad("too many columns", put("columns", 2**31), ValueError, "columns: got 2147483648",
            native=False),
        Bad("float seed", put("seed", torch.tensor(1.0)), TypeError, "seed: got dtype float32"),
        Bad("step of one dimension", put("step", torch.ones(1, dtype=torch.int64)), ValueError,
            "step: got shape", native=False),
        Bad("id too large", put("parameter_id", 2**32), ValueError, "parameter_id: got",
            native=False),
    ],
}  # fmt: skip
