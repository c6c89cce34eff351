"""One table of bad inputs per op, fed to its wrapper, its fake kernel and its native kernel.

`good(op)` makes arguments that pass, by the schema's names; each `Bad` spoils them. The native
kernels check for memory safety alone: `native` tells whether they too have to refuse.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Bad:
    name: str
    spoil: Callable[[Arguments], None]
    error: type[Exception]
    message: str
    native: bool = True


def _csr(*columns_per_row):
    counts = torch.tensor([0, *map(len, columns_per_row)])
    columns = [column for row in columns_per_row for column in row]
    return counts.cumsum(0), torch.tensor(columns, dtype=torch.int32)


def _good_sparse_adamw_() -> Arguments:
    crow, col = _csr([0, 2], [], [1, 2, 3])
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
    old, new = _csr([0, 2], [1]), _csr([2], [0, 1, 3])
    return {
        "new_values": [torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)],
        "old_values": [torch.randn(3), torch.randn(3).to(torch.bfloat16)],
        "old_crow_indices": old[0],
        "old_col_indices": old[1],
        "new_crow_indices": new[0],
        "new_col_indices": new[1],
    }


def _good_half_adamw_() -> Arguments:
    nothing = torch.empty(0, dtype=torch.int64)
    names = ("self", "grads", "masters", "state_steps", "parameter_ids", "lr", "beta1", "beta2",
             "weight_decay", "eps", "eps_mode", "maximize", "rounding")  # fmt: skip
    return {
        **{name: value for name, value in _good_sparse_adamw_().items() if name in names},
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


def _good_site(*names: str) -> Arguments:
    vectors = {name: torch.randn(4) for name in ("scale", "shift", "bias")}
    return {**{name: torch.randn(3, 4) for name in names}, **vectors}


def _good_norm_backward() -> Arguments:
    rows = {"grad": torch.randn(3, 4), "input": torch.randn(3, 4), "rstd": torch.rand(3)}
    return {**rows, "weight": torch.randn(4), "scale": torch.randn(4)}


def _good_sampled_grad_() -> Arguments:
    crow, col = _csr([0, 2], [], [1, 2, 3])
    return {
        "values": torch.zeros(5),
        "grad": torch.randn(6, 3),
        "input": torch.randn(6, 4),
        "crow_indices": crow,
        "col_indices": col,
        "route": "sampled",
    }


_GOOD: dict[str, Callable[[], Arguments]] = {
    "sparse_adamw_": _good_sparse_adamw_,
    "found_inf_": _good_found_inf_,
    "remap_": _good_remap_,
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
    "half_adamw_": _good_half_adamw_,
    "sampled_grad_": _good_sampled_grad_,
    "random_mask": lambda: {"count": 200, "mask_seed": torch.tensor(1), "mask_id": 0},
    "mask_counts": lambda: {"mask": torch.zeros(8, dtype=torch.int32), "count": 200},
    "scale_shift": lambda: {**_good_site("input"), "activation": "gelu", "channel_dim": -1},
    "scale_shift_": lambda: {**_good_site("input"), "channel_dim": -1},
    "scale_shift_backward": lambda: {
        **_good_site("grad", "saved"), "activation": "none", "channel_dim": -1,
    },
    "layer_norm_scale_shift": lambda: {
        **_good_site("input"), "weight": torch.randn(4), "eps": 1e-5,
    },
    "layer_norm_scale_shift_backward": lambda: {
        **_good_norm_backward(), "mean": torch.randn(3), "bias": torch.randn(4),
    },
    "rms_norm_scale_shift": lambda: {
        **{name: value for name, value in _good_site("input").items() if name != "bias"},
        "weight": torch.randn(4), "eps": 1e-5,
    },
    "rms_norm_scale_shift_backward": lambda: _good_norm_backward(),
}  # fmt: skip


def good(op: str) -> Arguments:
    """Arguments that the op takes, made anew, with the same random numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _GOOD[op]()


def put(name: str, value: Any, index: int | None = None) -> Callable[[Arguments], None]:
    """Replace an argument, or one entry of a list."""

    def spoil(arguments: Arguments) -> None:
        if index is None:
            arguments[name] = value
        else:
            arguments[name][index] = value

    return spoil


def drop(name: str) -> Callable[[Arguments], None]:
    """Shorten a list by one."""

    def spoil(arguments: Arguments) -> None:
        arguments[name] = arguments[name][:-1]

    return spoil


def both(*spoils: Callable[[Arguments], None]) -> Callable[[Arguments], None]:
    def spoil(arguments: Arguments) -> None:
        for one in spoils:
            one(arguments)

    return spoil


_WIDE_CROW = torch.tensor([0, 1, 2, 3, 4, 5])
_LISTS = (
    "grads", "crow_indices", "col_indices", "exp_avgs", "exp_avg_sqs", "state_steps",
    "parameter_ids",
)  # fmt: skip
_half = torch.float16

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
    Bad("another number of rows", put("crow_indices", _WIDE_CROW, 0), ValueError,
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


def _site_table(tensor: str, *vectors: str) -> list[Bad]:
    """What every op of family scale_shift refuses."""
    long = r"got shape \(5,\), want \(4,\), one per channel"
    return [
        Bad("no tensor", put(tensor, [1.0]), TypeError, f"{tensor}: got list, want a tensor"),
        Bad("integers", put(tensor, torch.zeros(3, 4, dtype=torch.int64)), TypeError,
            f"{tensor}: got dtype int64"),
        Bad("a number", put(tensor, torch.tensor(1.0)), ValueError, f"{tensor}: got shape"),
        Bad("a scale that is missing", put("scale", None), TypeError, "scale: got NoneType"),
        Bad("half vectors beside float32", put("scale", torch.ones(4).to(_half)), TypeError,
            "scale: got dtype float16, want float32"),
        Bad("a shift of another dtype",
            both(put("scale", torch.ones(4).to(_half)), put(tensor, torch.ones(3, 4).to(_half))),
            TypeError, "(shift|bias): got dtype float32, want float16|saved: got dtype float32"),
        Bad("a scale on another device", put("scale", torch.ones(4, device="meta")), ValueError,
            "scale: got device meta"),
        Bad("a scale with gaps", put("scale", torch.ones(8)[::2]), ValueError,
            "scale: got strides"),
        *(
            Bad(f"a long {name}", put(name, torch.zeros(5)), ValueError, f"{name}: {long}")
            for name in (vectors or ("scale", "shift", "bias"))
        ),
    ]  # fmt: skip


def _norm_backward_table() -> list[Bad]:
    return [
        Bad("no gradient", put("grad", None), TypeError, "grad: got NoneType, want a tensor"),
        Bad("a gradient with gaps", put("grad", torch.zeros(3, 8)[:, ::2]), ValueError,
            "grad: got strides"),
        Bad("another shape", put("input", torch.zeros(3, 5)), ValueError,
            r"input: got shape \(3, 5\), want \(3, 4\)"),
        Bad("narrow statistics", put("rstd", torch.ones(3).bfloat16()), TypeError,
            "rstd: got dtype bfloat16, want float32"),
        Bad("a number per channel", put("rstd", torch.ones(4)), ValueError,
            r"rstd: got shape \(4,\), want \(3,\)"),
        Bad("a long scale", put("scale", torch.zeros(5)), ValueError, "scale: got shape"),
    ]  # fmt: skip


BAD_INPUTS: dict[str, list[Bad]] = {
    "sampled_grad_": [
        Bad("no gradient", put("grad", None), TypeError, "grad: got NoneType, want a tensor"),
        Bad("a list of values", put("values", [0.0]), TypeError, "values: got list, want a tensor"),
        Bad("values of half precision", put("values", torch.zeros(5).to(_half)), TypeError,
            "values: got dtype float16, want float32"),
        Bad("float64 values beside float32", put("values", torch.zeros(5, dtype=torch.float64)),
            TypeError, "values: got dtype float64, want float32"),
        Bad("values that are too few", put("values", torch.zeros(4)), ValueError,
            r"values: got shape \(4,\), want \(5,\)"),
        Bad("values with gaps", put("values", torch.zeros(10)[::2]), ValueError,
            "values: got strides"),
        Bad("integer gradients", put("grad", torch.zeros(6, 3, dtype=torch.int64)), TypeError,
            "grad: got dtype int64"),
        Bad("an input of another dtype", put("input", torch.zeros(6, 4).to(_half)), TypeError,
            "input: got dtype float16, want float32"),
        Bad("an input on another device", put("input", torch.zeros(6, 4, device="meta")),
            ValueError, "input: got device meta, want cpu"),
        Bad("a batch of gradients", put("grad", torch.zeros(2, 3, 3)), ValueError,
            r"grad: got shape \(2, 3, 3\), want a matrix"),
        Bad("an input of other tokens", put("input", torch.zeros(5, 4)), ValueError,
            r"input: got shape \(5, 4\) beside grad \(6, 3\)"),
        Bad("another number of rows", put("crow_indices", _WIDE_CROW), ValueError,
            r"crow_indices: got shape \(6,\), want \(4,\)"),
        Bad("int32 rows", put("crow_indices", torch.zeros(4, dtype=torch.int32)), TypeError,
            "crow_indices: got dtype int32, want int64"),
        Bad("int64 columns", put("col_indices", torch.zeros(5, dtype=torch.int64)), TypeError,
            "col_indices: got dtype int64, want int32"),
        Bad("an unknown route", put("route", "dense"), ValueError,
            "route: got 'dense', want 'sampled' or 'panels'"),
    ],
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
                put("self", [torch.zeros(3, 4).to(_half), torch.zeros(5).to(_half)]),
                put("grads", torch.zeros(5).to(_half), 1)), TypeError,
            r"grads\[1\]: got dtype torch.float16 beside torch.float32", native=False),
        Bad("integer weights", both(put("self", torch.zeros(3, 4, dtype=torch.int64), 0)),
            TypeError, r"self\[0\]: got dtype int64"),
        Bad("half grads", both(put("grads", torch.zeros(3, 4).to(_half), 0),
                               put("grads", torch.zeros(5).to(_half), 1)), TypeError,
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
                put("exp_avgs", [torch.zeros(5).to(_half)] * 2),
                put("exp_avg_sqs", [torch.zeros(5).to(_half)] * 2)), TypeError,
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
        Bad("half lr", put("lr", torch.tensor(0.1).to(_half)), TypeError, "lr: got dtype float16"),
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
                put("self", [torch.zeros(3, 4).to(_half), torch.zeros(5).to(_half)]),
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
        Bad("half factors", both(put("left", torch.zeros(3, 2).to(_half)),
                                 put("right", torch.zeros(2, 4).to(_half))), TypeError,
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
        Bad("half grads", put("grads", [torch.zeros(4, 3).to(_half), torch.zeros(6).to(_half)]),
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
    "scale_shift": [
        *_site_table("input"),
        Bad("unknown activation", put("activation", "relu"), ValueError,
            "activation: got 'relu', want 'none' or 'gelu' or 'gelu_tanh'"),
        Bad("channels in dimension 0", put("channel_dim", 0), ValueError,
            "channel_dim: got 0, want -1"),
        Bad("channels first of a vector", both(put("input", torch.zeros(4)), put("channel_dim", 1)),
            ValueError, r"input: got shape \(4,\), want at least 2 dimensions"),
    ],
    "scale_shift_": [
        *_site_table("input"),
        Bad("an input with gaps", put("input", torch.zeros(3, 8)[:, ::2]), ValueError,
            "input: got strides"),
        Bad("channels in dimension 2", put("channel_dim", 2), ValueError, "channel_dim: got 2"),
    ],
    "scale_shift_backward": [
        *_site_table("grad"),
        Bad("nothing saved", put("saved", None), ValueError, "saved: got None"),
        Bad("an output behind an activation",
            both(put("activation", "gelu"), put("from_output", True)), ValueError,
            "from_output: got True with activation 'gelu'"),
        Bad("another shape saved", put("saved", torch.zeros(2, 4)), ValueError,
            r"saved: got shape \(2, 4\), want \(3, 4\)"),
        Bad("another dtype saved", put("saved", torch.zeros(3, 4).bfloat16()), TypeError,
            "saved: got dtype bfloat16, want float32"),
        Bad("a transposed one saved", put("saved", torch.zeros(4, 3).t()), ValueError,
            "saved: got strides"),
        Bad("unknown activation", put("activation", "relu"), ValueError, "activation: got 'relu'"),
    ],
    "layer_norm_scale_shift": [
        *_site_table("input"),
        Bad("a weight too long", put("weight", torch.zeros(5)), ValueError,
            r"weight: got shape \(5,\), want \(4,\)"),
        Bad("negative eps", put("eps", -1.0), ValueError, "eps: got -1.0", native=False),
    ],
    "layer_norm_scale_shift_backward": [
        *_norm_backward_table(),
        Bad("too few means", put("mean", torch.zeros(2)), ValueError,
            r"mean: got shape \(2,\), want \(3,\)"),
        Bad("a bias too long", put("bias", torch.zeros(5)), ValueError, "bias: got shape"),
    ],
    "rms_norm_scale_shift": [
        *_site_table("input", "scale", "shift"),
        Bad("integer weight", put("weight", torch.ones(4).int()), TypeError,
            "weight: got dtype int32"),
        Bad("NaN for eps", put("eps", float("nan")), ValueError, "eps: got nan", native=False),
    ],
    "rms_norm_scale_shift_backward": _norm_backward_table(),
}  # fmt: skip

CASES = [(op, bad) for op, table in BAD_INPUTS.items() for bad in table]
CASE_IDS = [f"{op}-{bad.name.replace(' ', '-')}" for op, bad in CASES]
