"""Family half_mask: arguments that its ops take, and what they refuse."""

from collections.abc import Callable

import torch

from bad_inputs.case import Arguments, Bad, both, drop, put
from bad_inputs.sparse_adamw import GOOD as SPARSE_ADAMW


def _good_half_adamw_() -> Arguments:
    nothing = torch.empty(0, dtype=torch.int64)
    names = ("self", "grads", "masters", "state_steps", "parameter_ids", "lr", "beta1", "beta2",
             "weight_decay", "eps", "eps_mode", "maximize", "rounding")  # fmt: skip
    return {
        **{name: value for name, value in SPARSE_ADAMW["sparse_adamw_"]().items() if name in names},
        "self": [torch.randn(4, 3), torch.randn(6)],
        "grads": [torch.randn(4, 3), torch.randn(6)],
        "live": [torch.tensor([0, 2]).int(), torch.tensor([1, 4, 5]).int()],
        "ranks": [nothing, nothing],
        "exp_avgs": [torch.zeros(2, 3), torch.zeros(3, 1)],
        "exp_avg_sqs": [torch.zeros(2, 3), torch.zeros(3, 1)],
        "mask_ids": [0, 1],
        "level": "rows",
    }


def _elements(arguments: Arguments) -> None:
    """Good arguments for level elements: one stored mask of two entries, one that is drawn."""
    stored = torch.tensor([5, 0, 0, 0], dtype=torch.int32)
    arguments.update(
        level="elements",
        live=[stored, torch.empty(0, dtype=torch.int32)],
        ranks=[torch.tensor([0, 2]), torch.tensor([0, 3])],
        exp_avgs=[torch.zeros(2), torch.zeros(3)],
        exp_avg_sqs=[torch.zeros(2), torch.zeros(3)],
        mask_seed=torch.tensor(0),
    )


GOOD: dict[str, Callable[[], Arguments]] = {
    "half_adamw_": _good_half_adamw_,
    "random_mask": lambda: {"count": 200, "mask_seed": torch.tensor(1), "mask_id": 0},
    "mask_counts": lambda: {"mask": torch.zeros(8, dtype=torch.int32), "count": 200},
}  # fmt: skip

BAD: dict[str, list[Bad]] = {
    "half_adamw_": [
        *[Bad(f"too few {name}", drop(name), ValueError, f"{name}: got 1 entries, want 2")
          for name in ("grads", "live", "ranks", "exp_avgs", "exp_avg_sqs", "state_steps",
                       "parameter_ids", "mask_ids")],
        Bad("unknown level", put("level", "entries"), ValueError,
            "level: got 'entries', want 'rows' or 'columns' or 'elements'"),
        Bad("parameters no list", put("self", torch.zeros(4, 3)), TypeError, "self: got Tensor",
            native=False),
        Bad("integer parameter", put("self", torch.zeros(4, 3, dtype=torch.int64), 0), TypeError,
            r"self\[0\]: got dtype int64"),
        Bad("grad of another shape", put("grads", torch.zeros(3, 4), 0), ValueError,
            r"grads\[0\]: got shape \(3, 4\), want \(4, 3\)"),
        Bad("half grads", put("grads", [torch.zeros(4, 3).half(), torch.zeros(6).half()]),
            TypeError, r"grads\[0\]: got dtype float16, want float32"),
        Bad("grad elsewhere", put("grads", torch.zeros(4, 3, device="meta"), 0), ValueError,
            r"grads\[0\]: got device meta, want cpu"),
        Bad("strided vector", put("self", torch.zeros(12)[::2], 1), ValueError,
            r"self\[1\]: got strides \(2,\)"),
        Bad("int64 rows", put("live", torch.tensor([0, 2]), 0), TypeError,
            r"live\[0\]: got dtype int64, want int32"),
        Bad("matrix of rows", put("live", torch.zeros(1, 2, dtype=torch.int32), 0), ValueError,
            r"live\[0\]: got shape \(1, 2\), want 1-D"),
        Bad("more rows than moments", put("live", torch.tensor([0, 1, 2]).int(), 0), ValueError,
            r"exp_avgs\[0\]: got shape \(2, 3\), want \(3, 3\)"),
        Bad("more rows than there are", both(put("live", torch.zeros(5).int(), 0),
                put("exp_avgs", torch.zeros(5, 3), 0), put("exp_avg_sqs", torch.zeros(5, 3), 0)),
            ValueError, r"live\[0\]: got 5 rows, more than there are"),
        Bad("flat moments of rows", put("exp_avgs", torch.zeros(6), 0), ValueError,
            r"exp_avgs\[0\]: got shape \(6,\), want a matrix for rows"),
        Bad("moments of too few columns", put("exp_avgs", torch.zeros(2, 2), 0), ValueError,
            r"exp_avgs\[0\]: got shape \(2, 2\), want the rows or columns"),
        Bad("moments that divide nothing", put("exp_avgs", torch.zeros(2, 5), 0), ValueError,
            r"exp_avgs\[0\]: got shape \(2, 5\), which doesn't fit"),
        Bad("second moments of another shape", put("exp_avg_sqs", torch.zeros(3, 2), 0), ValueError,
            r"exp_avg_sqs\[0\]: got shape \(3, 2\), want \(2, 3\)"),
        Bad("moments of two dtypes", put("exp_avg_sqs", torch.zeros(2, 3).bfloat16(), 0), TypeError,
            r"exp_avg_sqs\[0\]: got dtype torch.bfloat16 beside torch.float32"),
        Bad("strided moment", put("exp_avgs", torch.zeros(3, 2).t(), 0), ValueError,
            r"exp_avgs\[0\]: got strides \(1, 2\)"),
        Bad("masters of wide weights", put("masters", [torch.zeros(2, 3), torch.zeros(3, 1)]),
            TypeError, "masters: got some beside torch.float32"),
        Bad("integer step", put("state_steps", torch.tensor(1), 0), TypeError,
            r"state_steps\[0\]: got dtype int64, want float32"),
        Bad("negative mask id", put("mask_ids", -1, 0), ValueError, r"mask_ids\[0\]: got -1",
            native=False),
        Bad("lr no tensor", put("lr", 0.1), TypeError, "lr: got float", native=False),
        Bad("beta1 of 1", put("beta1", 1.0), ValueError, "beta1: got 1.0", native=False),
        Bad("unknown rounding", put("rounding", "up"), ValueError, "rounding: got 'up'"),
        Bad("float mask_seed", put("mask_seed", torch.tensor(1.0)), TypeError,
            "mask_seed: got dtype float32"),
        Bad("drawn mask without a seed", both(_elements, put("mask_seed", None)), ValueError,
            r"mask_seed: got None, want a 0-d int64 tensor, as live\[1\] is no stored mask"),
        Bad("mask too short", both(_elements, put("live", torch.zeros(3).int(), 0)), ValueError,
            r"live\[0\]: got shape \(3,\), want \(4,\)"),
        Bad("too few ranks", both(_elements, put("ranks", torch.tensor([0]), 0)), ValueError,
            r"ranks\[0\]: got shape \(1,\), want \(2,\)"),
        Bad("int32 ranks", both(_elements, put("ranks", torch.zeros(2).int(), 0)), TypeError,
            r"ranks\[0\]: got dtype int32, want int64"),
        Bad("moments of elements as a matrix", both(_elements,
                put("exp_avgs", torch.zeros(1, 2), 0), put("exp_avg_sqs", torch.zeros(1, 2), 0)),
            ValueError, r"exp_avgs\[0\]: got shape \(1, 2\), want a vector of at most 12"),
    ],
    "random_mask": [
        Bad("negative count", put("count", -1), ValueError, "count: got -1, want at least 0"),
        Bad("float seed", put("mask_seed", torch.tensor(1.0)), TypeError,
            "mask_seed: got dtype float32, want int64"),
        Bad("seed of one dimension", put("mask_seed", torch.ones(1).long()), ValueError,
            "mask_seed: got shape", native=False),
        Bad("id too large", put("mask_id", 2**32), ValueError, "mask_id: got", native=False),
    ],
    "mask_counts": [
        Bad("no tensor", put("mask", [1]), TypeError, "mask: got list"),
        Bad("int64 words", put("mask", torch.zeros(8, dtype=torch.int64)), TypeError,
            "mask: got dtype int64, want int32"),
        Bad("too short", put("mask", torch.zeros(7, dtype=torch.int32)), ValueError,
            r"mask: got shape \(7,\), want \(8,\)"),
        Bad("negative count", put("count", -1), ValueError, "count: got -1"),
    ],
}  # fmt: skip
