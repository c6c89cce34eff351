"""Family scale_shift: arguments that its ops take, and what they refuse."""

from collections.abc import Callable

import torch

from bad_inputs.case import Arguments, Bad, both, put


def _good_site(*names: str) -> Arguments:
    vectors = {name: torch.randn(4) for name in ("scale", "shift", "bias")}
    return {**{name: torch.randn(3, 4) for name in names}, **vectors}


def _good_norm_backward() -> Arguments:
    rows = {"grad": torch.randn(3, 4), "input": torch.randn(3, 4), "rstd": torch.rand(3)}
    return {**rows, "weight": torch.randn(4), "scale": torch.randn(4)}


def _site_table(tensor: str, *vectors: str) -> list[Bad]:
    """What every op of family scale_shift refuses."""
    long = r"got shape \(5,\), want \(4,\), one per channel"
    return [
        Bad("no tensor", put(tensor, [1.0]), TypeError, f"{tensor}: got list, want a tensor"),
        Bad("integers", put(tensor, torch.zeros(3, 4, dtype=torch.int64)), TypeError,
            f"{tensor}: got dtype int64"),
        Bad("a number", put(tensor, torch.tensor(1.0)), ValueError, f"{tensor}: got shape"),
        Bad("a scale that is missing", put("scale", None), TypeError, "scale: got NoneType"),
        Bad("half vectors beside float32", put("scale", torch.ones(4).half()), TypeError,
            "scale: got dtype float16, want float32"),
        Bad("a shift of another dtype",
            both(put("scale", torch.ones(4).half()), put(tensor, torch.ones(3, 4).half())),
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


GOOD: dict[str, Callable[[], Arguments]] = {
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

BAD: dict[str, list[Bad]] = {
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
