"""HFT's draw: every law of it over a thousand seeds, and the names that it knows."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch

from half_models import FAMILIES, make
from partune.selection import Half, HalfPlan
from partune.selection.half import Structure, read_structure

SEEDS = range(1000)


def llama_shapes(layers: int, heads: int = 4, kv_heads: int = 4) -> dict[str, tuple[int, ...]]:
    width, kv = 8 * heads, 8 * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (50, width)}
    for i in range(layers):
        for name, shape in (
            ("self_attn.q_proj", (width, width)), ("self_attn.k_proj", (kv, width)),
            ("self_attn.v_proj", (kv, width)), ("self_attn.o_proj", (width, width)),
            ("mlp.gate_proj", (48, width)), ("mlp.up_proj", (48, width)),
            ("mlp.down_proj", (width, 48)), ("input_layernorm", (width,)),
            ("post_attention_layernorm", (width,)),
        ):  # fmt: skip
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (50, width)}


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def live_modules(plan: HalfPlan, layer: int, modules: tuple[str, ...]) -> tuple[str, ...]:
    start = f"model.layers.{layer}."
    return tuple(
        module
        for module in modules
        for name, live in plan.live.items()
        if name.startswith(start) and name.endswith(f"{module}.weight") and live.kind == "all"
    )


def assert_uniform(counts: Counter, outcomes: int) -> None:
    """Every outcome occurs, each as often as the others within 4.5 sigma."""
    assert len(counts) == outcomes
    n, p = sum(counts.values()), 1 / outcomes
    for outcome, count in counts.items():
        assert abs(count - n * p) < 4.5 * (n * p * (1 - p)) ** 0.5, f"{outcome}: {count} of {n}"


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_published_draw_over_a_thousand_seeds(layers: int) -> None:
    structure = read_structure(llama_shapes(layers), None)
    attention, mlps, norms, large = Counter(), Counter(), Counter(), Counter()
    plans = set()
    for seed in SEEDS:
        plan = Half(seed).draw(structure)
        plans.add(tuple(plan.units.values()))
        sizes = []
        for layer in range(layers):
            two = live_modules(plan, layer, ATTENTION)
            some = live_modules(plan, layer, MLP)
            one = live_modules(plan, layer, NORMS)
            assert len(two) == 2 and len(one) == 1
            attention[two] += 1
            mlps[some] += 1
            norms[one] += 1
            sizes.append(len(some))
        assert sizes.count(2) == layers // 2 and sizes.count(1) == layers - layers // 2
        large[tuple(sizes)] += 1
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            assert plan.live[name].kind == "all"
    assert_uniform(attention, 6)
    assert_uniform(norms, 2)
    assert_uniform(Counter({some: n for some, n in mlps.items() if len(some) == 1}), 3)
    if layers > 1:
        assert_uniform(Counter({some: n for some, n in mlps.items() if len(some) == 2}), 3)
        assert_uniform(large, {2: 2, 5: 10}[layers])
        assert len(plans) > 900 if layers == 5 else 300


def test_layers_are_drawn_independently() -> None:
    structure = read_structure(llama_shapes(2), None)
    pairs = Counter()
    for seed in SEEDS:
        plan = Half(seed).draw(structure)
        pairs[live_modules(plan, 0, NORMS) + live_modules(plan, 1, NORMS)] += 1
    assert_uniform(pairs, 4)


def test_seeds_far_apart_and_negative_give_other_plans() -> None:
    structure = read_structure(llama_shapes(8), None)
    seeds = (0, 1, 2**32, 2**63 - 1, -1, -(2**63))
    assert len({tuple(Half(seed).draw(structure).units.values()) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize(("level", "pools"), [("layer", 4), ("model", 1)])
def test_coarser_levels(level: str, pools: int) -> None:
    structure = read_structure(llama_shapes(4), None)
    seen: Counter = Counter()
    for seed in SEEDS:
        plan = Half(seed, level=level).draw(structure)
        matrices = [len(live_modules(plan, i, ATTENTION + MLP)) for i in range(4)]
        norms = [len(live_modules(plan, i, NORMS)) for i in range(4)]
        assert sum(matrices) == 14 and sum(norms) == 4
        if level == "layer":
            assert sorted(matrices) == [3, 3, 4, 4] and norms == [1, 1, 1, 1]
        seen.update(name for name, live in plan.units.items() if live)
    for name, count in seen.items():
        assert abs(count - 500) < 4.5 * 250**0.5, name
    assert len(seen) == 36


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.6])
def test_other_ratios_keep_the_share_of_all_layers(ratio: float) -> None:
    structure = read_structure(llama_shapes(10), None)
    for seed in range(100):
        plan = Half(seed, ratio=ratio).draw(structure)
        for modules in (ATTENTION, MLP, NORMS):
            counts = [len(live_modules(plan, layer, modules)) for layer in range(10)]
            assert sum(counts) == int(10 * len(modules) * ratio + 1e-9)
            assert max(counts) - min(counts) <= 1


def test_balance_by_parameters_with_grouped_queries() -> None:
    structure = read_structure(llama_shapes(3, heads=4, kv_heads=2), None)
    counted, balanced = Counter(), Counter()
    for seed in SEEDS:
        for balance, counts in (("matrices", counted), ("parameters", balanced)):
            plan = Half(seed, balance=balance).draw(structure)
            for layer in range(3):
                counts[live_modules(plan, layer, ATTENTION)] += 1
    assert_uniform(counted, 6)
    assert_uniform(balanced, 4)  # a large one and a small one: exactly half of the parameters
    for pair in balanced:
        assert len({"q_proj", "o_proj"} & set(pair)) == 1


def test_llama_2_7b_trains_51_9_percent() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    for seed in range(5):
        assert abs(Half(seed).plan(model).share - 0.519) <= 0.001


# ---- names ----

# By family: units of a block, and norms of it that learn.
BLOCKS = {
    "Llama": (9, {1}), "Qwen2": (9, {1}), "Qwen3": (11, {2}), "Mistral": (9, {1}),
    "Gemma2": (11, {2}), "GPT2": (8, {1}), "GPTNeoX": (8, {1}), "Phi": (7, {0, 1}),
    "Phi3": (9, {1}), "Bert": (8, {1}), "ViT": (8, {1}), "Mixtral": (18, {1}),
}  # fmt: skip


def split(unit: str) -> tuple[str, str]:
    block, _, part = unit.rpartition(" ")
    return block, part


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_known(family: str) -> None:
    plan = Half(seed=3).plan(make(family, "meta"))
    blocks: dict[str, dict[str, bool]] = {}
    for unit, live in plan.units.items():
        block, part = split(unit)
        blocks.setdefault(block, {})[part] = live
    assert len(blocks) == 3
    mlps = []
    for parts in blocks.values():
        units, norms = BLOCKS[family]
        assert len(parts) == units, sorted(parts)
        assert sum(parts[part] for part in "qkvo") == 2
        names = {"gate", "up", "down"}
        for group in {part.rpartition(".")[0] for part in parts if part.split(".")[-1] in names}:
            mine = [
                live for part, live in parts.items()
                if part.rpartition(".")[0] == group and part.split(".")[-1] in names
            ]  # fmt: skip
            mlps.append((len(mine), sum(mine)))
        is_norm = {part for part in parts if "norm" in part.lower() or part.startswith("ln")}
        assert sum(parts[part] for part in is_norm) in norms
    if mlps[0][0] == 2:
        assert all(live == 1 for _, live in mlps)
    else:
        assert sorted(live for _, live in mlps).count(2) == len(mlps) // 2
    outside = {n for n in plan.shapes if not any(part.isdigit() for part in n.split("."))}
    assert outside <= set(plan.always)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_goes_with_its_matrix_and_parts_are_whole(family: str) -> None:
    for seed in range(8):
        plan = Half(seed).plan(make(family, "meta"))
        for name, live in plan.live.items():
            if name.endswith(".bias") and name.replace(".bias", ".weight") in plan.live:
                weight = plan.live[name.replace(".bias", ".weight")]
                assert (live.kind, live.ranges) == (weight.kind, weight.ranges)


def test_fused_matrices_are_drawn_as_slices() -> None:
    seen: dict[str, set] = {"GPT2": set(), "GPTNeoX": set(), "Phi3": set()}
    for family, found in seen.items():
        model = make(family, "meta")
        for seed in range(40):
            plan = Half(seed).plan(model)
            name = next(n for n in plan.live if "qkv" in n or "c_attn" in n or "key_value" in n)
            block = {split(u)[1]: live for u, live in plan.units.items() if ".0 " in u}
            parts = tuple(part for part in "qkv" if block[part])
            found.add((parts, plan.live[name].kind, plan.live[name].ranges))
    # q, k and v take 32 columns each of GPT-2's [in, out]; Phi-3's grouped k and v 16 rows.
    assert (("k",), "columns", ((32, 64),)) in seen["GPT2"]
    assert (("q", "v"), "columns", ((0, 32), (64, 96))) in seen["GPT2"]
    assert (("v",), "rows", ((48, 64),)) in seen["Phi3"]
    assert (("q", "k"), "rows", ((0, 48),)) in seen["Phi3"]
    # GPT-NeoX: 4 heads of 3 times 8 rows.
    assert (("k",), "rows", ((8, 16), (32, 40), (56, 64), (80, 88))) in seen["GPTNeoX"]


def test_a_query_slice_of_gpt_neox_is_what_the_model_takes_as_queries() -> None:
    """Queries change with their rows, keys and values don't."""
    model = make("GPTNeoX")
    attention = model.gpt_neox.layers[0].attention
    seed = next(s for s in range(99) if Half(s).plan(model).units["gpt_neox.layers.0 q"]
                and not Half(s).plan(model).units["gpt_neox.layers.0 k"]
                and not Half(s).plan(model).units["gpt_neox.layers.0 v"])  # fmt: skip
    live = Half(seed).plan(model).live["gpt_neox.layers.0.attention.query_key_value.weight"]
    x = torch.randn(1, 5, 32)

    def parts() -> list[torch.Tensor]:
        qkv = attention.query_key_value(x).view(1, 5, 4, 3 * 8).transpose(1, 2)
        return list(qkv.chunk(3, dim=-1))

    before = parts()
    with torch.no_grad():
        rows = torch.cat([torch.arange(*bounds) for bounds in live.ranges])
        attention.query_key_value.weight[rows] += 1.0
    changed = [not torch.equal(a, b) for a, b in zip(before, parts(), strict=True)]
    assert changed == [True, False, False]


def test_every_stacked_expert_is_an_mlp_of_its_own() -> None:
    plan = Half(seed=0).plan(make("Mixtral", "meta"))
    kinds = {live.kind for name, live in plan.live.items() if "experts" in name}
    assert kinds <= {"rows", "all", "none"}
    gate_up = plan.live["model.layers.0.mlp.experts.gate_up_proj"]
    rows = {row for bounds in gate_up.ranges for row in range(*bounds)}
    for expert in range(4):
        for part, start in (("gate", 0), ("up", 48)):
            mine = set(range(expert * 96 + start, expert * 96 + start + 48))
            live = plan.units[f"model.layers.0 experts.{expert}.{part}"]
            assert mine <= rows if live else not mine & rows


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("encoder.layer.0.attention.attention.query.weight", "q"),
        ("layers.0.block_sparse_moe.experts.3.w1.weight", "experts.3.gate"),
        ("transformer.layer.2.attention.q_lin.weight", "q"),
        ("encoder.layers.0.encoder_attn.k_proj.weight", "encoder_attn.k"),
        ("encoder.layers.0.linear1.weight", "up"),
        ("visual.transformer.resblocks.0.ln_1.weight", "ln_1"),
        ("module.model.layers.11.mlp.down_proj.weight", "down"),
    ],
)
def test_other_names(name: str, part: str) -> None:
    beside = {name.rsplit(".", 2)[0].split(".experts")[0] + ".fc1.weight": (4, 4)}
    structure = read_structure({name: (4, 4), **beside}, None)
    (unit,) = [piece.unit for piece in structure.pieces if piece.parameter == name]
    assert ".".join(map(str, (*unit.group, unit.part))) == part


def test_patterns_tell_other_names() -> None:
    shapes = {f"net.{i}.mixer.{name}": shape for i in range(2) for name, shape in
              (("Wqkv.weight", (24, 8)), ("out.weight", (8, 8)), ("gain", (8,)))}  # fmt: skip
    patterns = ((r"mixer\.Wqkv", "attention.q+k+v"), (r"mixer\.out", "attention.o"))
    with pytest.raises(ValueError, match="no attention or MLP matrix has a name that is known"):
        Half(seed=0).plan(shapes)
    plan = Half(seed=0, patterns=(*patterns, (r"mixer\.gain", "norm"))).plan(shapes)
    assert plan.units.keys() == {
        f"net.{i} {part}" for i in range(2) for part in ("q", "k", "v", "o", "mixer.gain")
    }
    assert HalfPlan.from_json(plan.to_json()) == plan


# ---- the plan ----


def test_a_plan_is_saved_and_the_same_in_another_process(tmp_path) -> None:
    for level in ("category", "rows", "elements"):
        plan = Half(seed=-5, level=level).plan(llama_shapes(5))
        plan.save(tmp_path / "plan.json")
        assert HalfPlan.load(tmp_path / "plan.json") == plan
    script = f"""
import torch; torch.manual_seed(99); torch.set_num_threads(1)
from partune.selection import Half
print(Half(seed=-5, level="elements").plan({llama_shapes(5)!r}).digest())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == plan.digest()


def test_the_draw_of_this_release() -> None:
    """Plans must not change from one release to the next."""
    plan = Half(seed=0).plan(llama_shapes(2))
    assert [name for name, live in plan.units.items() if live] == RELEASED
    lines = Half(seed=0, level="rows").plan(llama_shapes(1))
    name = "model.layers.0.mlp.up_proj.weight"
    assert lines.live[name].lines((48, 32), 0)[:8].tolist() == RELEASED_ROWS


RELEASED = [
    "model.layers.0 o",
    "model.layers.0 q",
    "model.layers.0 up",
    "model.layers.0 post_attention_layernorm",
    "model.layers.1 o",
    "model.layers.1 v",
    "model.layers.1 down",
    "model.layers.1 gate",
    "model.layers.1 input_layernorm",
]
RELEASED_ROWS = [0, 2, 4, 9, 11, 13, 16, 18]


def test_the_order_of_parameters_makes_no_difference() -> None:
    shapes = llama_shapes(12)
    backwards = dict(reversed(shapes.items()))
    for level in ("category", "model", "columns"):
        a, b = (Half(seed=1, level=level).plan(s) for s in (shapes, backwards))
        assert a.live == b.live


def test_a_plan_prints_what_learns() -> None:
    text = str(Half(seed=0).plan(llama_shapes(2)))
    first, *blocks, always = text.splitlines()
    assert first.startswith("HFT, level category, seed 0: ") and "parameters learn" in first
    assert len(blocks) == 2 and blocks[0].startswith("model.layers.0: ")
    assert always == "always: model.embed_tokens.weight, model.norm.weight, lm_head.weight"


@pytest.mark.parametrize("level", ["rows", "columns", "elements"])
def test_finer_levels_take_half_of_every_unit(level: str) -> None:
    plan = Half(seed=0, level=level).plan(llama_shapes(2))
    for name, live in plan.live.items():
        if name in plan.always:
            assert live.kind == "all"
        else:
            assert live.kind == level
            whole = 1
            for size in plan.shapes[name]:
                whole *= size
            assert live.entries(plan.shapes[name]) == whole // 2
    lines = {tuple(live.lines(plan.shapes[n], 0).tolist()) for n, live in plan.live.items()
             if live.kind == level != "elements"}  # fmt: skip
    assert len(lines) == (18 if level != "elements" else 0), "each unit has a draw of its own"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": 1.5}, TypeError, "seed: got 1.5, want an int"),
        ({"seed": True}, TypeError, "seed: got True"),
        ({"seed": 2**63}, ValueError, "seed: got 9223372036854775808, want 64 bits"),
        ({"level": "matrix"}, ValueError, "level: got 'matrix', want 'category' or 'layer'"),
        ({"balance": "rows"}, ValueError, "balance: got 'rows'"),
        ({"ratio": 1.0}, ValueError, "ratio: got 1.0, want 0 < ratio < 1"),
        ({"ratio": 0.4, "level": "elements"}, ValueError, "ratio: got 0.4, want 0.5 at level"),
        ({"patterns": (("a", "head"),)}, ValueError, "patterns: got role 'head'"),
        ({"patterns": (("a",),)}, TypeError, "patterns: got"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Half(**options)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="got None heads for 24 outputs, want the model"):
        Half().plan({"layers.0.attention.query_key_value.weight": (24, 8)})
    with pytest.raises(ValueError, match=r"got 25 outputs, which don't divide into q, k, v"):
        Half().plan({"layers.0.attn.qkv_proj.weight": (25, 8)})
    with pytest.raises(ValueError, match="got JSON that is no plan of HFT"):
        HalfPlan.from_json("{}")
    with pytest.raises(ValueError, match="got JSON that is no plan of HFT"):
        HalfPlan.from_json("half")


def test_a_structure_is_read_once_for_many_draws() -> None:
    structure = read_structure(llama_shapes(2), None)
    assert isinstance(structure, Structure)
    assert Half(seed=4).draw(structure) == Half(seed=4).plan(llama_shapes(2))
