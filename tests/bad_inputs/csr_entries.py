"""Family csr_entries: arguments that its ops take, and what they refuse."""

from collections.abc import Callable

import torch

from bad_inputs.case import Arguments, Bad, csr, drop, put


def _good() -> Arguments:
    csrs = csr([0, 2], [], [1, 2, 3]), csr([1])
    return {
        "matrices": [torch.randn(3, 4), torch.randn(1, 2).to(torch.bfloat16)],
        "values": [torch.zeros(5), torch.zeros(1)],
        "crow_indices": [crow for crow, _ in csrs],
        "col_indices": [col for _, col in csrs],
    }


_LISTS = ("values", "crow_indices", "col_indices")

_TABLE = [
    *(
        Bad(f"too few {name}", drop(name), ValueError, f"{name}: got 1 entries, want 2")
        for name in _LISTS
    ),
    Bad("matrices no list", put("matrices", torch.zeros(2, 3, 4)), TypeError,
        "matrices: got Tensor, want a list", native=False),
    Bad("values with None", put("values", None, 0), TypeError,
        r"values\[0\]: got NoneType, want a tensor"),
    Bad("values on another device", put("values", torch.zeros(5, device="meta"), 0), ValueError,
        r"values\[0\]: got device meta, want cpu"),
    Bad("matrices on two devices", put("matrices", torch.zeros(1, 2, device="meta"), 1),
        ValueError, r"matrices\[1\]: got device meta, want cpu"),
    Bad("an integer matrix", put("matrices", torch.zeros(3, 4, dtype=torch.int64), 0), TypeError,
        r"matrices\[0\]: got dtype int64"),
    Bad("half values of a float32 matrix", put("values", torch.zeros(5).half(), 0), TypeError,
        r"values\[0\]: got dtype float16, want float32"),
    Bad("half values of a bfloat16 matrix", put("values", torch.zeros(1).half(), 1), TypeError,
        r"values\[1\]: got dtype float16, want bfloat16 or float32"),
    Bad("float32 values of a float64 matrix",
        put("matrices", torch.zeros(3, 4, dtype=torch.float64), 0), TypeError,
        r"values\[0\]: got dtype float32, want float64"),
    Bad("a stack of matrices", put("matrices", torch.zeros(3, 2, 2), 0), ValueError,
        r"matrices\[0\]: got shape \(3, 2, 2\), want a matrix"),
    Bad("another number of rows", put("crow_indices", torch.arange(6), 0), ValueError,
        r"crow_indices\[0\]: got shape \(6,\), want \(4,\)"),
    Bad("no rows", put("crow_indices", torch.empty(0, dtype=torch.int64), 0), ValueError,
        r"crow_indices\[0\]: got no entries beside 5 col_indices"),
    Bad("int32 rows", put("crow_indices", torch.zeros(4, dtype=torch.int32), 0), TypeError,
        r"crow_indices\[0\]: got dtype int32, want int64"),
    Bad("int64 columns", put("col_indices", torch.zeros(5, dtype=torch.int64), 0), TypeError,
        r"col_indices\[0\]: got dtype int64, want int32"),
    Bad("more entries than the matrix has", put("matrices", torch.zeros(3, 1), 0), ValueError,
        r"col_indices\[0\]: got 5 entries, want at most 3", native=False),
    Bad("values that are too few", put("values", torch.zeros(4), 0), ValueError,
        r"values\[0\]: got shape \(4,\), want \(5,\)"),
    Bad("values with gaps", put("values", torch.zeros(10)[::2], 0), ValueError,
        r"values\[0\]: got strides \(2,\)"),
]  # fmt: skip

GOOD: dict[str, Callable[[], Arguments]] = {"gather_csr_": _good, "scatter_csr_": _good}

BAD: dict[str, list[Bad]] = {
    "gather_csr_": _TABLE,
    "scatter_csr_": [
        *_TABLE,
        Bad("a matrix whose rows are one", put("matrices", torch.zeros(4).expand(3, 4), 0),
            ValueError, r"matrices\[0\]: got strides \(0, 1\)", native=False),
    ],
}  # fmt: skip
