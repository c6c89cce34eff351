"""Family sampled_grad: arguments that its ops take, and what they refuse."""

from collections.abc import Callable

import torch
from torch import Tensor

from bad_inputs.case import Arguments, Bad, csr, put


def _good_sampled_grad_() -> Arguments:
    crow, col = csr([0, 2], [], [1, 2, 3])
    return {
        "values": torch.zeros(5),
        "grad": torch.randn(6, 3),
        "input": torch.randn(6, 4),
        "crow_indices": crow,
        "col_indices": col,
        "route": "sampled",
    }


def _blocks(per_row: int = 8, **spoilt: Tensor) -> Callable[[Arguments], None]:
    """Two blocks, and one argument of another size."""

    def spoil(arguments: Arguments) -> None:
        crow, col = csr(*[range(per_row)] * 4)
        arguments.update(
            values=torch.zeros(32), grad=torch.zeros(6, 4), input=torch.zeros(6, 8),
            crow_indices=crow, col_indices=col, route="blocks",
        )  # fmt: skip
        arguments.update(spoilt)
        rows = arguments["grad"].shape[1]
        arguments["crow_indices"] = torch.cat([crow, crow[-1:].expand(rows - 4)])

    return spoil


GOOD: dict[str, Callable[[], Arguments]] = {
    "sampled_grad_": _good_sampled_grad_,
}  # fmt: skip

BAD: dict[str, list[Bad]] = {
    "sampled_grad_": [
        Bad("no gradient", put("grad", None), TypeError, "grad: got NoneType, want a tensor"),
        Bad("a list of values", put("values", [0.0]), TypeError, "values: got list, want a tensor"),
        Bad("values of half precision", put("values", torch.zeros(5).half()), TypeError,
            "values: got dtype float16, want float32"),
        Bad("float64 values beside float32", put("values", torch.zeros(5, dtype=torch.float64)),
            TypeError, "values: got dtype float64, want float32"),
        Bad("values that are too few", put("values", torch.zeros(4)), ValueError,
            r"values: got shape \(4,\), want \(5,\)"),
        Bad("values with gaps", put("values", torch.zeros(10)[::2]), ValueError,
            "values: got strides"),
        Bad("integer gradients", put("grad", torch.zeros(6, 3, dtype=torch.int64)), TypeError,
            "grad: got dtype int64"),
        Bad("an input of another dtype", put("input", torch.zeros(6, 4).half()), TypeError,
            "input: got dtype float16, want float32"),
        Bad("an input on another device", put("input", torch.zeros(6, 4, device="meta")),
            ValueError, "input: got device meta, want cpu"),
        Bad("a batch of gradients", put("grad", torch.zeros(2, 3, 3)), ValueError,
            r"grad: got shape \(2, 3, 3\), want a matrix"),
        Bad("an input of other tokens", put("input", torch.zeros(5, 4)), ValueError,
            r"input: got shape \(5, 4\) beside grad \(6, 3\)"),
        Bad("another number of rows", put("crow_indices", torch.arange(6)), ValueError,
            r"crow_indices: got shape \(6,\), want \(4,\)"),
        Bad("int32 rows", put("crow_indices", torch.zeros(4, dtype=torch.int32)), TypeError,
            "crow_indices: got dtype int32, want int64"),
        Bad("int64 columns", put("col_indices", torch.zeros(5, dtype=torch.int64)), TypeError,
            "col_indices: got dtype int64, want int32"),
        Bad("an unknown route", put("route", "dense"), ValueError,
            "route: got 'dense', want 'sampled' or 'panels' or 'blocks'"),
        Bad("rows that aren't whole blocks", _blocks(grad=torch.zeros(6, 6)), ValueError,
            "grad: got 6 columns, want a multiple of 4 for route 'blocks', whose blocks are 4 by"),
        Bad("columns that aren't whole blocks", _blocks(input=torch.zeros(6, 10)),
            ValueError, "input: got 10 columns, want a multiple of 4 for route 'blocks'"),
        Bad("entries that aren't whole blocks", _blocks(values=torch.zeros(28), per_row=7),
            ValueError, "col_indices: got 28 entries, want a multiple of 16 for route 'blocks'"),
    ],
}  # fmt: skip
