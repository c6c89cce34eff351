"""Family sparse_adamw: arguments that its ops take, and what they refuse."""

from collections.abc import Callable

import torch

from bad_inputs.case import Arguments, Bad, both, csr, drop, put


def _good_sparse_adamw_() -> Arguments:
    crow, col = csr([0, 2], [], [1, 2, 3])
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    return {
        "self": [torch.randn(3, 4), torch.randn(5)],
        "grads": [torch.randn(3, 4), torch.randn(5)],
        "crow_indices": [crow, nothing[0]],
        "col_indices": [col, nothing[1]],
        "exp_avgs": [torch.zeros(5), torch.zeros(5)],
        "exp_avg_sqs": [torch.zeros(5), torch.zeros(5)],
        "masters": [],
        "state_steps": [torch.tensor(1.0), torch.tensor(1.0)],
        "parameter_ids": [0, 1],
        "lr": torch.tensor(0.1),
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.1,
        "eps": 1e-8,
        "eps_mode": "corrected",
        "maximize": False,
        "rounding": "nearest",
    }


def _good_found_inf_() -> Arguments:
    names = ("grads", "crow_indices", "col_indices")
    return {
        "found_inf": torch.tensor(0.0),
        **{name: value for name, value in _good_sparse_adamw_().items() if name in names},
    }


def _good_remap_() -> Arguments:
    old, new = csr([0, 2], [1]), csr([2], [0, 1, 3])
    return {
        "new_values": [torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)],
        "old_values": [torch.randn(3), torch.randn(3).to(torch.bfloat16)],
        "old_crow_indices": old[0],
        "old_col_indices": old[1],
        "new_crow_indices": new[0],
        "new_col_indices": new[1],
    }


_LISTS = (
    "grads", "crow_indices", "col_indices", "exp_avgs", "exp_avg_sqs", "state_steps",
    "parameter_ids",
)  # fmt: skip

_CSR_TABLE = [
    Bad("int32 rows", put("crow_indices", torch.zeros(4, dtype=torch.int32), 0), TypeError,
        r"crow_indices\[0\]: got dtype int32, want int64"),
    Bad("int64 columns", put("col_indices", torch.zeros(5, dtype=torch.int64), 0), TypeError,
        r"col_indices\[0\]: got dtype int64, want int32"),
    Bad("rows of a matrix", put("crow_indices", torch.zeros(2, 2, dtype=torch.int64), 0),
        ValueError, r"crow_indices\[0\]: got shape \(2, 2\), want 1-D"),
    Bad("strided columns",
        put("col_indices", torch.zeros(10, dtype=torch.int32)[::2], 0), ValueError,
        r"col_indices\[0\]: got strides \(2,\)"),
    Bad("another number of rows", put("crow_indices", torch.arange(6), 0), ValueError,
        r"crow_indices\[0\]: got 5 rows"),
    Bad("columns without rows", put("crow_indices", torch.empty(0, dtype=torch.int64), 0),
        ValueError, r"crow_indices\[0\]: got no entries beside 5 col_indices"),
    Bad("a CSR for a vector", both(put("crow_indices", torch.tensor([0, 1]), 1),
                                   put("col_indices", torch.tensor([0], dtype=torch.int32), 1)),
        ValueError, r"(self\[1\]|grads\[1\]): got shape \(5,\)"),
    Bad("grads no list", put("grads", torch.zeros(3, 4)), TypeError,
        "grads: got Tensor, want a list", native=False),
    Bad("grads with None", put("grads", None, 0), TypeError,
        r"grads\[0\]: got NoneType, want a tensor"),
    Bad("grads on another device", put("grads", torch.zeros(3, 4, device="meta"), 0), ValueError,
        r"grads\[0\]: got device meta, want cpu"),
    Bad("integer grads", put("grads", torch.zeros(3, 4, dtype=torch.int64), 0), TypeError,
        r"grads\[0\]: got dtype int64"),
]  # fmt: skip


GOOD: dict[str, Callable[[], Arguments]] = {
    "sparse_adamw_": _good_sparse_adamw_,
    "found_inf_": _good_found_inf_,
    "remap_": _good_remap_,
}  # fmt: skip

BAD: dict[str, list[Bad]] = {
    "sparse_adamw_": [
        *_CSR_TABLE,
        *(
            Bad(f"too few {name}", drop(name), ValueError, f"{name}: got 1 entries, want 2")
            for name in _LISTS
        ),
        Bad("one master", put("masters", [torch.zeros(5)]), ValueError,
            "masters: got 1 entries, want none or 2"),
        Bad("masters beside float32", put("masters", [torch.zeros(5)] * 2), TypeError,
            "masters: got some beside torch.float32", native=False),
        Bad("mixed weights", put("self", torch.zeros(5, dtype=torch.float64), 1), TypeError,
            r"self\[1\]: got dtype torch.float64 beside torch.float32"),
        Bad("mixed grads", both(
                put("self", [torch.zeros(3, 4).half(), torch.zeros(5).half()]),
                put("grads", torch.zeros(5).half(), 1)), TypeError,
            r"grads\[1\]: got dtype torch.float16 beside torch.float32", native=False),
        Bad("integer weights", both(put("self", torch.zeros(3, 4, dtype=torch.int64), 0)),
            TypeError, r"self\[0\]: got dtype int64"),
        Bad("half grads", both(put("grads", torch.zeros(3, 4).half(), 0),
                               put("grads", torch.zeros(5).half(), 1)), TypeError,
            r"grads\[0\]: got dtype float16, want float32"),
        Bad("grad of another shape", put("grads", torch.zeros(4, 4), 0), ValueError,
            r"grads\[0\]: got shape \(4, 4\), want \(3, 4\)"),
        Bad("compact grad too short", put("grads", torch.zeros(4), 0), ValueError,
            r"grads\[0\]: got shape \(4,\), want \(5,\)"),
        Bad("compact grad of a dense parameter", put("grads", torch.zeros(4), 1), ValueError,
            r"grads\[1\]: got shape \(4,\), want \(5,\)"),
        Bad("dense parameter with gaps", both(
                put("self", torch.zeros(10)[::2], 1), put("grads", torch.zeros(10)[::2], 1)),
            ValueError, r"self\[1\]: got strides \(2,\)"),
        Bad("strided dense grad", put("grads", torch.zeros(10)[::2], 1), ValueError,
            r"grads\[1\]: got strides \(2,\), want the dense parameter's"),
        Bad("strided stack", both(
                put("self", torch.zeros(3, 2, 4).transpose(0, 1), 0),
                put("grads", torch.zeros(2, 3, 4), 0)), ValueError, r"self\[0\]: got strides"),
        Bad("moment too short", put("exp_avgs", torch.zeros(4), 0), ValueError,
            r"exp_avgs\[0\]: got shape \(4,\), want \(5,\)"),
        Bad("moments of half precision", both(
                put("exp_avgs", [torch.zeros(5).half()] * 2),
                put("exp_avg_sqs", [torch.zeros(5).half()] * 2)), TypeError,
            r"exp_avgs\[0\]: got dtype float16, want float32 or bfloat16"),
        Bad("moments of two dtypes", put("exp_avg_sqs", torch.zeros(5).bfloat16(), 0), TypeError,
            r"exp_avg_sqs\[0\]: got dtype torch.bfloat16 beside torch.float32"),
        Bad("strided moment", put("exp_avgs", torch.zeros(10)[::2], 0), ValueError,
            r"exp_avgs\[0\]: got strides \(2,\)"),
        Bad("step of one dimension", put("state_steps", torch.ones(1), 0), ValueError,
            r"state_steps\[0\]: got shape \(1,\), want a 0-d tensor", native=False),
        Bad("integer step", put("state_steps", torch.tensor(1), 0), TypeError,
            r"state_steps\[0\]: got dtype int64, want float32"),
        Bad("negative id", put("parameter_ids", -1, 0), ValueError,
            r"parameter_ids\[0\]: got -1", native=False),
        Bad("lr no tensor", put("lr", 0.1), TypeError, "lr: got float, want a tensor",
            native=False),
        Bad("lr of one dimension", put("lr", torch.ones(1)), ValueError, "lr: got shape",
            native=False),
        Bad("half lr", put("lr", torch.tensor(0.1).half()), TypeError, "lr: got dtype float16"),
        Bad("beta1 of 1", put("beta1", 1.0), ValueError, "beta1: got 1.0", native=False),
        Bad("negative beta2", put("beta2", -0.1), ValueError, "beta2: got -0.1", native=False),
        Bad("negative decay", put("weight_decay", -1.0), ValueError, "weight_decay: got -1.0",
            native=False),
        Bad("eps not a number", put("eps", float("nan")), ValueError, "eps: got nan",
            native=False),
        Bad("unknown eps_mode", put("eps_mode", "both"), ValueError,
            "eps_mode: got 'both', want 'corrected' or 'uncorrected'"),
        Bad("unknown rounding", put("rounding", "up"), ValueError, "rounding: got 'up'"),
        Bad("float seed", put("seed", torch.tensor(1.0)), TypeError, "seed: got dtype float32"),
        Bad("offset of one dimension", put("offset", torch.ones(1, dtype=torch.int64)), ValueError,
            "offset: got shape", native=False),
        Bad("double grad_scale", put("grad_scale", torch.tensor(1.0).double()), TypeError,
            "grad_scale: got dtype float64", native=False),
        Bad("bool found_inf", put("found_inf", torch.tensor(False)), TypeError,
            "found_inf: got dtype bool"),
        Bad("rounding without a seed", both(
                put("self", [torch.zeros(3, 4).half(), torch.zeros(5).half()]),
                put("rounding", "stochastic")), ValueError, "seed: got None"),
        Bad("narrow moments without a seed", both(
                put("exp_avgs", [torch.zeros(5).bfloat16()] * 2),
                put("exp_avg_sqs", [torch.zeros(5).bfloat16()] * 2)), ValueError,
            "seed: got None"),
    ],
    "found_inf_": [
        *_CSR_TABLE,
        Bad("too few columns", drop("col_indices"), ValueError, "col_indices: got 1 entries"),
        Bad("flag of one dimension", put("found_inf", torch.zeros(1)), ValueError,
            "found_inf: got shape", native=False),
        Bad("bool flag", put("found_inf", torch.tensor(False)), TypeError,
            "found_inf: got dtype bool, want float32"),
        Bad("compact grad too short", put("grads", torch.zeros(4), 0), ValueError,
            r"grads\[0\]: got shape \(4,\), want \(5,\)"),
    ],
    "remap_": [
        Bad("values of two dtypes", put("old_values", torch.zeros(3).double(), 0), TypeError,
            r"old_values\[0\]: got dtype float64, want float32"),
        Bad("too few values", drop("old_values"), ValueError, "old_values: got 1 entries, want 2"),
        Bad("new values too short", put("new_values", torch.zeros(3), 0), ValueError,
            r"new_values\[0\]: got shape \(3,\), want \(4,\)"),
        Bad("old values too long", put("old_values", torch.zeros(4), 0), ValueError,
            r"old_values\[0\]: got shape \(4,\), want \(3,\)"),
        Bad("strided values", put("new_values", torch.zeros(8)[::2], 0), ValueError,
            r"new_values\[0\]: got strides"),
        Bad("integer values", both(put("new_values", torch.zeros(4, dtype=torch.int64), 0),
                                   put("old_values", torch.zeros(3, dtype=torch.int64), 0)),
            TypeError, r"new_values\[0\]: got dtype int64"),
        Bad("another number of rows", put("new_crow_indices", torch.tensor([0, 1, 2, 4])),
            ValueError, "new_crow_indices: got shape"),
        Bad("int64 columns", put("old_col_indices", torch.zeros(3, dtype=torch.int64)), TypeError,
            "old_col_indices: got dtype int64"),
        Bad("rows on another device", put("new_crow_indices", torch.zeros(3, device="meta").long()),
            ValueError, "new_crow_indices: got device meta"),
    ],
}  # fmt: skip
