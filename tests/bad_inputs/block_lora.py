"""Family block_lora: arguments that its ops take, and what they refuse."""

from collections.abc import Callable

import torch

from bad_inputs.case import Arguments, Bad, both, drop, put


def _good_block_lora_() -> Arguments:
    """Two members, two blocks."""
    return {
        "outputs": [torch.randn(3, 5), torch.randn(3, 2)],
        "input": torch.randn(3, 4),
        "downs": [torch.randn(3, 2), torch.randn(1, 2)],
        "ups": [torch.randn(5, 3), torch.randn(2, 1)],
        "scales": [1.0, 2.0],
        "share": "input",
    }


def _good_block_lora_backward_() -> Arguments:
    forward = _good_block_lora_()
    grads = forward.pop("outputs")
    return {
        "grad_input": torch.randn(3, 4),
        "grad_downs": [torch.zeros(3, 2), torch.zeros(1, 2)],
        "grad_ups": [torch.zeros(5, 3), torch.zeros(2, 1)],
        "grads": grads,
        "hidden": torch.randn(3, 4),
        **forward,
    }


def _block_lora_table(matrices: str) -> list[Bad]:
    """What both ops of family block_lora refuse; `matrices` are [tokens, out] of each member."""
    return [
        Bad("no tensor", put("input", [1.0]), TypeError, "input: got list, want a tensor"),
        Bad("integers", put("input", torch.zeros(3, 4).int()), TypeError, "input: got dtype int32"),
        Bad("an input of one dimension", put("input", torch.zeros(4)), ValueError,
            r"input: got shape \(4,\), want \(tokens, features\)"),
        Bad("an input with gaps", put("input", torch.zeros(3, 8)[:, ::2]), ValueError,
            "input: got strides"),
        Bad("blocks that do not divide", put("input", torch.zeros(3, 5)), ValueError,
            r"downs\[0\]: got shape \(3, 2\), want \(3, 5/blocks\): the number of blocks must"),
        Bad("an unknown share", put("share", "both"), ValueError,
            "share: got 'both', want 'input' or 'rank'"),
        Bad("arms for a shared input", put("ups", torch.zeros(2, 5, 3), 0), ValueError,
            r"ups\[0\]: got shape \(2, 5, 3\), want \(out, 3\)"),
        Bad("no arms for a shared rank", both(put("share", "rank"),
            put("downs", torch.zeros(3, 4), 0), put("downs", torch.zeros(1, 4), 1)), ValueError,
            r"ups\[0\]: got shape \(5, 3\), want \(blocks, out, 3\)"),
        Bad("a cut down for a shared rank", put("share", "rank"), ValueError,
            r"downs\[0\]: got shape \(3, 2\), want \(3, 4\): share='rank' cuts the rank"),
        Bad("other blocks in a group", put("downs", torch.zeros(1, 4), 1), ValueError,
            r"downs\[1\]: got 1 blocks beside 2, want one number of blocks per call"),
        Bad("no ranks", put("downs", torch.zeros(0, 2), 0), ValueError,
            r"downs\[0\]: got shape \(0, 2\), want a matrix with a row per rank"),
        Bad("another rank", put("ups", torch.zeros(5, 2), 0), ValueError,
            r"ups\[0\]: got shape \(5, 2\), want \(out, 3\)"),
        Bad("16-bit adapters", put("downs", torch.zeros(3, 2).half(), 0), TypeError,
            r"downs\[0\]: got dtype float16, want float32"),
        Bad("a transposed adapter", put("ups", torch.zeros(3, 5).t(), 0), ValueError,
            r"ups\[0\]: got strides"),
        Bad("an adapter on another device", put("downs", torch.zeros(3, 2, device="meta"), 0),
            ValueError, r"downs\[0\]: got device meta, want cpu"),
        Bad("no members", both(*(put(name, []) for name in ("downs", "ups", "scales", matrices))),
            ValueError, "downs: got no entries"),
        Bad("a member without an up", drop("ups"), ValueError,
            "ups: got 1 entries, want 2, one per member"),
        Bad("a scale too few", put("scales", [1.0]), ValueError, "scales: got 1 entries, want 2"),
        Bad("a matrix too few", drop(matrices), ValueError, f"{matrices}: got 1 entries, want 2"),
        Bad("another number of tokens", put(matrices, torch.zeros(2, 5), 0), ValueError,
            rf"{matrices}\[0\]: got shape \(2, 5\), want \(3, 5\)"),
        Bad("other columns", put(matrices, torch.zeros(3, 3), 1), ValueError,
            rf"{matrices}\[1\]: got shape \(3, 3\), want \(3, 2\)"),
        Bad("another dtype", put(matrices, torch.zeros(3, 5).half(), 0), TypeError,
            rf"{matrices}\[0\]: got dtype float16, want float32"),
        Bad("a matrix with gaps", put(matrices, torch.zeros(3, 10)[:, ::2], 0), ValueError,
            rf"{matrices}\[0\]: got strides"),
        Bad("all dropped", put("dropout", 1.0), ValueError,
            "dropout: got 1.0, want 0 <= dropout < 1"),
        Bad("negative dropout", put("dropout", -0.1), ValueError, "dropout: got -0.1"),
        Bad("dropout without a seed", put("dropout", 0.1), ValueError, "seed: got None"),
        Bad("dropout without a step", both(put("dropout", 0.1), put("seed", torch.tensor(1))),
            ValueError, "step: got None, want it with dropout"),
        Bad("a float step", both(put("dropout", 0.1), put("seed", torch.tensor(1)),
            put("step", torch.tensor(1.0))), TypeError, "step: got dtype float32, want int64"),
        Bad("an id too large", put("layer_id", 2**32), ValueError, "layer_id: got", native=False),
    ]  # fmt: skip


GOOD: dict[str, Callable[[], Arguments]] = {
    "block_lora_": _good_block_lora_,
    "block_lora_backward_": _good_block_lora_backward_,
}  # fmt: skip

BAD: dict[str, list[Bad]] = {
    "block_lora_": _block_lora_table("outputs"),
    "block_lora_backward_": [
        *_block_lora_table("grads"),
        Bad("another shape of the input's gradient", put("grad_input", torch.zeros(3, 5)),
            ValueError, r"grad_input: got shape \(3, 5\), want \(3, 4\)"),
        Bad("a hidden too narrow", put("hidden", torch.zeros(3, 3)), ValueError,
            r"hidden: got shape \(3, 3\), want \(3, 4\)"),
        Bad("a 16-bit hidden", put("hidden", torch.zeros(3, 4).half()), TypeError,
            "hidden: got dtype float16, want float32"),
        Bad("a gradient too few", drop("grad_downs"), ValueError,
            "grad_downs: got 1 entries, want 2"),
        Bad("another shape of an up's gradient", put("grad_ups", torch.zeros(3, 5), 0), ValueError,
            r"grad_ups\[0\]: got shape \(3, 5\), want \(5, 3\)"),
        Bad("a transposed gradient", put("grad_ups", torch.zeros(3, 5).t(), 0), ValueError,
            r"grad_ups\[0\]: got strides"),
    ],
}  # fmt: skip
