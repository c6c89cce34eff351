"""Block-LoRA, given what can't be: one sentence each, and nothing is changed."""

import json

import pytest
import torch
from torch import nn

from nn_models import VisionTransformer, transformers_model
from partune.nn import (
    BlockLoRA,
    BlockLoRAConfig,
    BlockLoRALinear,
    ScaleShiftConfig,
    attach,
    detach,
    disable_adapter,
    fingerprint,
    load_adapter,
    merge,
    mixed_adapters,
    save_adapter,
    set_adapter,
    unmerge,
)
from test_bad_input_adapters import ENCODER, unchanged


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


OPTIONS = [
    (dict(rank=0), "rank: got 0, want an int of at least 1"),
    (dict(rank=2.0), r"rank: got 2\.0, want an int of at least 1"),
    (dict(rank=True), "rank: got True, want an int"),
    (dict(blocks=0), "blocks: got 0, want an int of at least 1"),
    (dict(share="both"), "share: got 'both', want 'input' or 'rank'"),
    (dict(scaling="root"), "scaling: got 'root', want 'standard' or 'rslora'"),
    (dict(alpha=0.0), r"alpha: got 0\.0, want a number above 0, or None for that of rank"),
    (dict(alpha=float("nan")), "alpha: got nan, want a number above 0"),
    (dict(dropout=1.0), r"dropout: got 1\.0, want a probability below 1"),
    (dict(dropout=-0.1), r"dropout: got -0\.1, want a probability below 1"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=range(len(OPTIONS)))
def test_bad_options(options, message):
    for make in (
        lambda: BlockLoRA(64, 64, **options),
        lambda: BlockLoRALinear(64, 64, **options),
        lambda: BlockLoRALinear.from_linear(nn.Linear(64, 64), **options),
        lambda: BlockLoRAConfig(**options),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(rank_pattern={"q": 0}), ValueError, "rank: got 0, want an int of at least 1"),
        (dict(alpha_pattern={"q": -1.0}), ValueError, r"alpha: got -1\.0, want a number above 0"),
        (dict(modules_to_save="head"), TypeError, "modules_to_save: got the string 'head'"),
        (dict(parts={"qkv": "q"}), TypeError, r"parts\['qkv'\]: got the string 'q', want a list"),
        (dict(parts={"qkv": ()}), ValueError, r"parts\['qkv'\]: got none, want some; leave"),
    ],
)
def test_bad_config(options, error, message):
    with pytest.raises(error, match=message):
        BlockLoRAConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(blocks=5), "blocks: the layer has 64 input features, which 5 blocks don't divide; "
                         "choose a divisor of 64"),
        (dict(blocks=3, share="rank"), "blocks: the layer has 8 rows of its rank, which 3 blocks"),
    ],
)  # fmt: skip
def test_blocks_that_do_not_divide(options, message):
    with pytest.raises(ValueError, match=message):
        BlockLoRA(64, 64, **options)


BAD = [
    (VisionTransformer(), dict(blocks=3), ValueError,
     "blocks: blocks.0.attn.qkv has 8 input features, which 3 blocks don't divide; choose a div"),
    (VisionTransformer(), dict(blocks=4, share="rank", rank=6), ValueError,
     "blocks: blocks.0.attn.qkv has 6 rows of its rank, which 4 blocks don't divide"),
    (VisionTransformer(), dict(rank_pattern={"fc1": 3}, share="rank"), ValueError,
     "blocks: blocks.0.mlp.fc1 has 3 rows of its rank, which 2 blocks don't"),
    (VisionTransformer(), dict(target_modules=["q_proj"]), ValueError,
     r"target_modules: \['q_proj'\] matched no layer of VisionTransformer, which has blocks.0.att"),
    (VisionTransformer(), dict(target_modules=["attn"]), TypeError,
     "blocks.0.attn is a Attention, want a linear layer"),
    (VisionTransformer(), dict(target_modules=["patch_embed.proj"]), TypeError,
     "patch_embed.proj is a Conv2d, want a linear layer"),
    (VisionTransformer(), dict(target_modules=["head"]), ValueError, "head is in the head"),
    (VisionTransformer(), dict(modules_to_save=["classifier"]), ValueError,
     "modules_to_save: got 'classifier', which is no module of VisionTransformer"),
    (VisionTransformer(), dict(rank_pattern={"fc3": 2}), ValueError,
     r"rank_pattern: \['fc3'\] matched none of the layers that get factors, such as blocks.0.attn"),
    (VisionTransformer(), dict(alpha_pattern={"head": 2.0}), ValueError, r"alpha_pattern: \['head"),
    (VisionTransformer(), dict(parts={"kqv": ("q",)}), ValueError, r"parts: \['kqv'\] match"),
    (VisionTransformer(), dict(parts={"attn.qkv": ("gate",)}), ValueError,
     "parts: got 'gate' for blocks.0.attn.qkv, whose parts are known as q, k, v; say which rows"),
    (VisionTransformer(), dict(parts={"fc1": ("up",)}), ValueError,
     "parts: got 'up' for blocks.0.mlp.fc1, whose parts are known as none; say which rows they"),
    (nn.Sequential(nn.Linear(4, 12)), dict(parts={"0": ("q",)}), ValueError,
     r"parts: .* say which rows they are, such as parts={'0': {'q': \(0, 64\)}}"),
    (VisionTransformer(), dict(parts={"attn.qkv": {"q": (0, 25)}}), ValueError,
     r"parts: got rows \[0, 25\) for q of blocks.0.attn.qkv, want some of its 24"),
    (VisionTransformer(), dict(parts={"attn.qkv": {"q": (8, 8)}}), ValueError, r"rows \[8, 8\)"),
    (VisionTransformer(), dict(parts={"attn.qkv": {"q": (0, 9), "k": (8, 16)}}), ValueError,
     "parts: row 8 of blocks.0.attn.qkv is in two of q, k"),
    (VisionTransformer(), dict(parts={"attn.qkv": {"train": (0, 8)}}), ValueError,
     "parts: got the name 'train', want an identifier that names nothing else"),
    (VisionTransformer(), dict(parts={"attn.qkv": {"a.b": (0, 8)}}), ValueError,
     r"parts: got the name 'a\.b', want an identifier"),
    (nn.Sequential(nn.ReLU()), {}, ValueError, "matched no layer .* which has none for Block-LoRA"),
    (ENCODER, dict(target_modules=["linear1"]), ValueError,
     "linear1 is computed by its TransformerEncoderLayer without being called"),
    (nn.Sequential(BlockLoRALinear(4, 4)), {}, ValueError,
     "0 has an adapter that was attached to another module than this Sequential"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "options", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_attach(model, options, error, message):
    def act():
        with pytest.raises(error, match=message) as caught:
            attach(model, BlockLoRAConfig(**options))
        assert "\n" not in str(caught.value)

    unchanged(model, act)


@pytest.mark.parametrize("linear", [nn.Conv1d(4, 4, 1), Scaled(4, 4), 3], ids=str)
def test_no_linear_layer(linear):
    with pytest.raises(TypeError, match=f"linear: got {type(linear).__name__}, want an nn.Linear"):
        BlockLoRALinear.from_linear(linear)


# ---- switching, mixing and merging ----


def two(head=()):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    attach(model, BlockLoRAConfig(rank=2, modules_to_save=head), name="a")
    return attach(model, BlockLoRAConfig(rank=2), name="b")


def test_adapters_that_can_not_be_mixed():
    model = two()
    attach(model, ScaleShiftConfig(), name="ssf")

    def act():
        with (
            pytest.raises(TypeError, match="names: got the string 'a', want a list with one name"),
            mixed_adapters(model, "a"),
        ):
            pass
        with (
            pytest.raises(ValueError, match=r"names: got 'c', want one of \['a', 'b', 'ssf'\]"),
            mixed_adapters(model, ["a", "c"]),
        ):
            pass
        with (
            pytest.raises(ValueError, match="'ssf' is a ScaleShiftConfig's adapter, which can't"),
            mixed_adapters(model, ["a", "ssf"]),
        ):
            pass
        with (
            mixed_adapters(model, ["a", None, "b"]),
            pytest.raises(ValueError, match="names: got 3 for a Linear whose input has 2 rows"),
        ):
            model(torch.ones(2, 8))
        with (
            pytest.raises(RuntimeError, match="while mixed"),
            mixed_adapters(model, ["a"]),
        ):
            raise RuntimeError("while mixed")

    unchanged(model, act)
    with (
        pytest.raises(ValueError, match="got a Linear without adapters; attach one first"),
        mixed_adapters(nn.Linear(4, 4), [None]),
    ):
        pass


def test_nothing_changes_adapters_while_they_are_mixed(tmp_path):
    model = two()
    x = torch.randn(2, 8)
    wanted = model(x)
    with mixed_adapters(model, ["a", "b"]):
        for change in (
            lambda: set_adapter(model, "a"),
            lambda: set_adapter(model, None),
            lambda: attach(model, BlockLoRAConfig(), name="c"),
            lambda: detach(model),
            lambda: merge(model),
            lambda: save_adapter(model, tmp_path / "a"),
            lambda: mixed_adapters(model, ["a"]).__enter__(),
            lambda: disable_adapter(model).__enter__(),
        ):
            with pytest.raises(ValueError, match="model: its adapters are mixed; leave that block"):
                change()
    assert torch.equal(model(x), wanted)


def test_disabling_what_has_no_adapters():
    with (
        pytest.raises(ValueError, match="got a Linear without adapters; attach one first"),
        disable_adapter(nn.Linear(4, 4)),
    ):
        pass


def test_bad_merges():
    model = two()

    def act():
        with pytest.raises(ValueError, match=r"name: \['a', 'b'\] are attached, want one"):
            merge(model)
        with pytest.raises(ValueError, match="keep: got 'all', want 'original', 'adapter' or None"):
            merge(model, keep="all")
        with pytest.raises(ValueError, match="into which nothing is merged; only merge"):
            unmerge(model)

    unchanged(model, act)
    ssf = attach(nn.Sequential(nn.Linear(4, 4)), ScaleShiftConfig())

    def subtract():
        with pytest.raises(ValueError, match="keep: got 'adapter', but what a ScaleShiftConfig's "):
            merge(ssf, keep="adapter")

    unchanged(ssf, subtract)
    set_adapter(model, "a")
    detach(model, "b")
    merge(model)
    with pytest.raises(ValueError, match="into which nothing is merged; only merge"):
        unmerge(model)


def test_nothing_changes_adapters_while_one_is_merged(tmp_path):
    model = two()
    base, x = fingerprint(model), torch.randn(2, 8)
    detach(model, "a")
    wanted = model(x)
    path = tmp_path / "a.safetensors"
    save_adapter(model, path)
    merge(model, keep="original")

    def act():
        for change in (
            lambda: set_adapter(model, "a"),
            lambda: attach(model, BlockLoRAConfig(), name="c"),
            lambda: detach(model),
            lambda: merge(model),
            lambda: save_adapter(model, path),
            lambda: load_adapter(model, path),
            lambda: mixed_adapters(model, ["a"]).__enter__(),
            lambda: disable_adapter(model).__enter__(),
        ):
            message = r"model: an adapter is merged into its weights; call unmerge\(model\) first"
            with pytest.raises(ValueError, match=message):
                change()

    unchanged(model, act)
    assert fingerprint(model) == base, "that of the base, at attach"
    unmerge(model)
    assert torch.equal(model(x), wanted)


def test_a_batch_that_fails_leaves_the_model_merged():
    model = two()
    detach(model, "a")
    merge(model, keep="original")
    weight = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError):
        unmerge(model, torch.ones(2, 9))
    assert torch.equal(model[0].weight, weight) and type(model[0]) is nn.Linear
    unmerge(model, torch.ones(2, 8))


def test_a_layer_in_a_way_of_its_own_is_not_merged():
    model = attach(nn.Sequential(Scaled(4, 4)), BlockLoRAConfig(rank=2))
    nn.init.ones_(model[0].adapter.up)

    def act():
        with pytest.raises(ValueError, match="0: a Scaled computes its output in a way of its own"):
            merge(model)

    unchanged(model, act)


# ---- files ----


def edit(path, **options):
    """Write another config into a file."""
    import safetensors.torch

    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), **options})
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=3), r"has transformer.h.0.attn.c_attn.down of shape \(2, 4\), want \(3, 4\)"),
        (dict(share="rank"), r"has transformer.h.0.attn.c_attn.down of shape"),
        (dict(colour=1), "is damaged: its config can't be read"),
        (dict(rank=0), "is damaged: its config can't be read .rank: got 0"),
        (dict(parts={"c_attn": ["q"]}), "doesn't fit the model: .* is in one alone"),
        (dict(blocks=5), "blocks: transformer.h.0.attn.c_attn has 8 input features"),
    ],
)
def test_wrong_files(options, message, tmp_path):
    model = transformers_model("gpt2")
    path = tmp_path / "a.safetensors"
    save_adapter(attach(model, BlockLoRAConfig(rank=2)), path)
    detach(model)
    edit(path, **options)

    def act():
        with pytest.raises(ValueError, match=message) as caught:
            load_adapter(model, path)
        assert "\n" not in str(caught.value)

    unchanged(model, act)


def test_bad_inputs_to_a_layer():
    layer = BlockLoRALinear(8, 4)
    for x, error, message in (
        (torch.ones(2, 7), ValueError, r"input: got shape \(2, 7\), want \(\.\.\., 8\)"),
        (torch.ones(()), ValueError, r"input: got shape \(\), want \(\.\.\., 8\)"),
        (torch.ones(2, 8).bfloat16(), TypeError, r"weights\[0\]: got dtype torch.float32 beside"),
        (torch.ones(2, 8).long(), TypeError, r"weights\[0\]: .* beside an input of torch.int64"),
    ):
        with pytest.raises(error, match=message):
            layer(x)
