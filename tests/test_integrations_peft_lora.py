"""Block-LoRA as LoRA checkpoints that stock peft computes alike, and peft's as ours."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from nn_models import LANGUAGE, SIZES
from partune.integrations.peft import (
    BlockLoRAPeftConfig,
    ScaleShiftPeftConfig,
    export_lora,
    load_lora,
)
from partune.nn import BlockLoRAConfig, ScaleShiftConfig, attach, detach, set_adapter
from peft_models import (
    TOLERANCE,
    copy_of_state,
    in_peft,
    model_and_output,
    move_ups,
    plain_state,
    relative,
    same_state,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def no_warnings():
    """peft warns of keys that it didn't find, and of patterns that match nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is deprecated in transformers and torch
        warnings.simplefilter("error", UserWarning)
        yield


def options_of(folder):
    return json.loads((folder / CONFIG).read_text())


# ---- out ----


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "convnext", "timm-vit"])
@pytest.mark.parametrize(("share", "blocks"), [("input", 1), ("input", 4), ("rank", 2)])
@pytest.mark.parametrize("owner", ["attach", "peft"])
def test_stock_peft_computes_the_same(kind, share, blocks, owner, tmp_path):
    model, run = model_and_output(kind)
    base, fresh = run(model), copy.deepcopy(model)
    options = dict(rank=4, blocks=blocks, share=share, alpha=6.0)
    if owner == "attach":
        tuned = move_ups(attach(model, BlockLoRAConfig(**options)))
    else:
        tuned = in_peft(model, BlockLoRAPeftConfig(**options))
    wanted = run(tuned)
    export_lora(tuned, tmp_path)
    assert relative(wanted, base) > 1e-2
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert relative(run(loaded), wanted) <= TOLERANCE
    assert torch.equal(run(tuned), wanted), "the model is as it was"
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


STOCK = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, kept = sys.argv[1:]
tokens, wanted = torch.load(kept)
with torch.no_grad():
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    got = model(input_ids=tokens).logits
    merged = model.merge_and_unload()(input_ids=tokens).logits
assert "partune" not in sys.modules and model.active_peft_config.peft_type == "LORA"
print(*(float((logits - wanted).abs().max() / wanted.abs().max()) for logits in (got, merged)))
"""


def test_in_a_process_that_never_heard_of_partune(tmp_path):
    model, _ = model_and_output("gpt2")
    model.save_pretrained(tmp_path / "base")
    move_ups(attach(model, BlockLoRAConfig(rank=4, scaling="rslora", parts={"c_attn": ("q", "v")})))
    tokens = torch.randint(3, 50, (2, 5))
    with torch.no_grad():
        torch.save((tokens, model(input_ids=tokens).logits), tmp_path / "kept.pt")
    export_lora(model, tmp_path / "adapter")
    command = [sys.executable, "-W", "ignore", "-c", STOCK]
    command += [str(tmp_path / name) for name in ("base", "adapter", "kept.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(float(drift) <= TOLERANCE for drift in done.stdout.split())


def test_what_the_files_hold(tmp_path):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    attach(
        model,
        BlockLoRAConfig(rank=4, blocks=2, alpha=2.0, dropout=0.1, rank_pattern={"2": 2}),
    )
    move_ups(model)
    export_lora(model, tmp_path)
    tensors, options = load_file(tmp_path / WEIGHTS), options_of(tmp_path)
    down, up = model[0].adapter.down, model[0].adapter.up
    assert torch.equal(tensors["base_model.model.0.lora_A.weight"], torch.cat([down, down], 1))
    assert torch.equal(tensors["base_model.model.0.lora_B.weight"], up * 2.0 / 4.0)
    assert torch.equal(tensors["base_model.model.2.lora_B.weight"], model[2].adapter.up)
    assert len(tensors) == 4 and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    wanted = dict(
        peft_type="LORA", r=4, lora_alpha=4, rank_pattern={"^2": 2}, alpha_pattern={"^2": 2},
        lora_dropout=0.1, bias="none", fan_in_fan_out=False, use_rslora=False, inference_mode=True,
    )  # fmt: skip
    assert {key: options[key] for key in wanted} == wanted
    assert sorted(options["target_modules"]) == ["0", "2"]


def test_the_arms_are_summed(tmp_path):
    model = nn.Sequential(nn.Linear(8, 6))
    attach(model, BlockLoRAConfig(rank=4, blocks=2, share="rank"))
    move_ups(model)
    export_lora(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    adapter = model[0].adapter
    assert torch.equal(tensors["base_model.model.0.lora_A.weight"], adapter.down)
    assert torch.equal(tensors["base_model.model.0.lora_B.weight"], adapter.up[0] + adapter.up[1])
    assert options_of(tmp_path)["r"] == options_of(tmp_path)["lora_alpha"] == 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ranks_and_alphas_by_layer(kind, tmp_path):
    model, run = model_and_output(kind)
    fresh = copy.deepcopy(model)
    last = {"llama": "layers.1.mlp.up_proj", "gpt2": "h.1.mlp.c_fc"}[kind]
    wide = {"llama": "self_attn.v_proj", "gpt2": "attn.c_proj"}[kind]
    config = BlockLoRAConfig(rank=2, rank_pattern={last: 6, wide: 4}, alpha_pattern={last: 1.0})
    move_ups(attach(model, config))
    export_lora(model, tmp_path)
    assert sorted(options_of(tmp_path)["rank_pattern"].values()) == [4, 4, 6]
    loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)
    assert relative(run(loaded), run(model)) <= TOLERANCE
    assert relative(run(load_lora(fresh, tmp_path)), run(model)) <= TOLERANCE


def test_parts_of_a_fused_layer(tmp_path):
    model, run = model_and_output("gpt2")
    fresh = copy.deepcopy(model)
    move_ups(attach(model, BlockLoRAConfig(rank=2, blocks=4, parts={"c_attn": ("q", "v")})))
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert relative(run(loaded), run(model)) <= TOLERANCE
    options = options_of(tmp_path)
    assert options["r"] == 2 and set(options["rank_pattern"].values()) == {4}
    assert options["fan_in_fan_out"]


def classifier():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, **LANGUAGE)).eval()


@pytest.mark.parametrize("owner", ["attach", "peft"])
def test_a_trained_head_goes_along(owner, tmp_path):
    model, tokens = classifier(), torch.randint(3, 50, (2, 5))
    fresh = copy.deepcopy(model)
    if owner == "attach":
        attach(model, BlockLoRAConfig())
    else:
        model = get_peft_model(model, BlockLoRAPeftConfig(task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in move_ups(model).parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        wanted = model(input_ids=tokens).logits
        export_lora(model, tmp_path)
        options = options_of(tmp_path)
        assert options["modules_to_save"] == ["classifier"]
        assert options["task_type"] == ("SEQ_CLS" if owner == "peft" else None)
        loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)
        assert relative(loaded(input_ids=tokens).logits, wanted) <= TOLERANCE
        again = load_lora(fresh, tmp_path)
        assert relative(again(input_ids=tokens).logits, wanted) <= TOLERANCE


class NamedAlike(nn.Module):
    """`lin` is the last part of both names, and a whole name is the end of another."""

    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"lin": nn.Linear(4, 4)})
        self.b = nn.ModuleDict({"a": nn.ModuleDict({"lin": nn.Linear(4, 4)})})

    def forward(self, x):
        return self.b["a"]["lin"](self.a["lin"](x))


@pytest.mark.parametrize("target", [r"a\.lin", r"b\.a\.lin", r".*lin"])
def test_names_that_end_alike(target, tmp_path):
    base, x = NamedAlike(), torch.randn(3, 4)
    model = attach(copy.deepcopy(base), BlockLoRAConfig(target_modules=target, rank=2))
    export_lora(move_ups(model), tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative(loaded(x), model(x)) <= TOLERANCE
    ours = load_lora(base, tmp_path)
    assert relative(ours(x), model(x)) <= TOLERANCE
    swapped = [n for n, m in ours.named_modules() if type(m).__name__ == "BlockLoRALinear"]
    wanted = {r"a\.lin": ["a.lin"], r"b\.a\.lin": ["b.a.lin"]}
    assert swapped == wanted.get(target, ["a.lin", "b.a.lin"])


def test_one_adapter_of_several(tmp_path):
    model, run = model_and_output("llama")
    fresh = copy.deepcopy(model)
    attach(model, BlockLoRAConfig(rank=2), name="first")
    first = run(move_ups(model, "first"))
    attach(model, ScaleShiftConfig(), name="second")
    export_lora(model, tmp_path, name="first")
    assert relative(run(PeftModel.from_pretrained(fresh, tmp_path)), first) <= TOLERANCE
    with pytest.raises(ValueError, match=r"name: 'second' is scale_shift, want block_lora"):
        export_lora(model, tmp_path / "none")
    set_adapter(model, None)
    with pytest.raises(ValueError, match="name: no adapter is active, want one of"):
        export_lora(model, tmp_path / "none")
    with pytest.raises(ValueError, match="name: got 'third', want one of"):
        export_lora(model, tmp_path / "none", name="third")
    with pytest.raises(ValueError, match="without adapters; attach one first"):
        export_lora(nn.Linear(2, 2), tmp_path / "none")
    with pytest.raises(ValueError, match="it is itself the layer, which peft can't name"):
        export_lora(attach(nn.Linear(2, 2), BlockLoRAConfig()), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_one_adapter_of_several_in_peft(tmp_path):
    model, run = model_and_output("llama")
    fresh = copy.deepcopy(model)
    tuned = in_peft(model, BlockLoRAPeftConfig(), "first")
    first = run(tuned)
    tuned.add_adapter("second", BlockLoRAPeftConfig(target_modules=["q_proj"], rank=2))
    move_ups(tuned, "second").set_adapter("second")
    second = run(tuned)
    for name, wanted in {None: second, "first": first, "second": second}.items():
        export_lora(tuned, tmp_path / str(name), name=name)
        loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / str(name))
        assert relative(run(loaded), wanted) <= TOLERANCE
    with pytest.raises(ValueError, match=r"got 'third', want one that is Block-LoRA, of \['first'"):
        export_lora(tuned, tmp_path, name="third")
    other = get_peft_model(fresh, ScaleShiftPeftConfig())
    with pytest.raises(ValueError, match=r"got 'default', want one that is Block-LoRA, of \[\]"):
        export_lora(other, tmp_path)


def test_adapters_that_add_up_are_merged_together():
    model, run = model_and_output("llama")
    fresh = copy.deepcopy(model)
    tuned = in_peft(model, BlockLoRAPeftConfig(target_modules=["q_proj", "up_proj"]), "first")
    tuned.add_adapter("second", BlockLoRAPeftConfig(target_modules=["q_proj"], rank=2))
    move_ups(tuned, "second")
    before, state = run(tuned), copy_of_state(tuned)
    wanted = {
        f"{name}.weight": fresh.get_parameter(f"{name}.weight")
        + sum(adapter.delta() for adapter in layer.block_lora.values())
        for name, layer in tuned.get_base_model().named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    tuned.merge_adapter(adapter_names=["first"])
    assert relative(run(tuned), before) <= TOLERANCE
    tuned.merge_adapter(adapter_names=["first", "second"])
    assert relative(run(tuned), before) > 10 * TOLERANCE
    tuned.unmerge_adapter()
    assert torch.equal(run(tuned), before) and same_state(tuned, state)
    merged = tuned.merge_and_unload(adapter_names=["first", "second"]).state_dict()
    assert len(wanted) == 4
    assert all(relative(merged[key], value) <= TOLERANCE for key, value in wanted.items())
    rest = fresh.state_dict().keys() - wanted.keys()
    assert all(torch.equal(merged[key], fresh.state_dict()[key]) for key in rest)


# ---- in ----

LORA = dict(r=4, lora_alpha=6, target_modules="all-linear", lora_dropout=0.1)
CHECKPOINTS = [
    ("llama", {}),
    ("gpt2", {}),
    ("bert", dict(use_rslora=True)),
    ("vit", dict(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])),
    ("llama", dict(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 3})),
    ("llama", dict(alpha_pattern={"o_proj": 1}, rank_pattern={r"^model\.layers\.0\.": 2})),
    (
        "llama",
        dict(init_lora_weights="gaussian", target_modules=["o_proj"], layers_to_transform=[1]),
    ),
    ("timm-vit", dict(target_modules=["qkv", "fc1"], modules_to_save=["head"])),
]


@pytest.mark.parametrize(("kind", "options"), CHECKPOINTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_of_peft_in_our_layer(kind, options, dtype, tmp_path):
    model, run = model_and_output(kind)
    fresh = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own words on Conv1D
        tuned = get_peft_model(model, LoraConfig(**{**LORA, **options})).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter)).copy_(parameter.to(dtype))
    wanted = run(tuned)
    tuned.save_pretrained(tmp_path)
    tensors = {key: value.to(dtype) for key, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    plain, state = plain_state(fresh), copy_of_state(fresh)
    ours = load_lora(fresh, tmp_path)
    assert relative(run(ours), wanted) <= TOLERANCE
    trained = [p for p in ours.parameters() if p.requires_grad]
    counted = [p for p in tuned.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in counted)
    assert all(p.dtype == torch.float32 for p in trained)
    export_lora(ours, tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == tensors.keys()
    downs = [key for key in tensors if "lora_A" in key]
    assert downs and all(torch.equal(again[key], tensors[key].float()) for key in downs)
    detach(ours)
    assert plain_state(ours) == plain and same_state(ours, state)


def write_checkpoint(folder, options=None, tensors=None):
    """A good one for `nn.Sequential(nn.Linear(8, 4), ReLU, nn.Linear(4, 2))`, but for these."""
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    get_peft_model(model, LoraConfig(r=2, target_modules=["0"])).save_pretrained(folder)
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **(options or {})}))
    kept = load_file(folder / WEIGHTS)
    for key, value in (tensors or {}).items():
        kept.pop("base_model.model." + key, None)
        if value is not None:
            kept["base_model.model." + key] = value
    save_file(kept, folder / WEIGHTS)


A, B = "0.lora_A.weight", "0.lora_B.weight"
BAD = [
    (dict(peft_type="IA3"), {}, ValueError, "is of IA3, want LORA"),
    (dict(use_dora=True), {}, ValueError, "has use_dora=True, which a plain low-rank product does"),
    (dict(bias="all"), {}, ValueError, "has bias='all', which a plain low-rank product doesn't"),
    (dict(init_lora_weights="pissa"), {}, ValueError, "has init_lora_weights='pissa', which a pl"),
    (dict(lora_bias=True), {}, ValueError, "has lora_bias=True"),
    (dict(target_parameters=["weight"]), {}, ValueError, "has target_parameters=.'weight'."),
    (dict(trainable_token_indices=[1]), {}, ValueError, "has trainable_token_indices=.1."),
    (dict(use_of_tomorrow={"x": 1}), {}, ValueError, "has use_of_tomorrow={'x': 1}, which a plain"),
    (dict(r=4), {}, ValueError, "has rank 2 for 0, its config says 4"),
    (dict(rank_pattern={"0": 3}), {}, ValueError, "has rank 2 for 0, its config says 3"),
    (dict(lora_alpha=0), {}, ValueError, "alpha: got 0, want a number above 0"),
    ({}, {"0.bias": torch.ones(4)}, ValueError, "has 0.bias, which belongs to no low-rank product"),
    ({}, {"0.lora_magnitude_vector": torch.ones(4)}, ValueError, "has 0.lora_magnitude_vector"),
    ({}, {A: None, B: None}, ValueError, "has no lora_A"),
    ({}, {B: None}, ValueError, "doesn't fit the model: 0.up is in one alone"),
    ({}, {A: torch.ones(2, 9)}, ValueError, r"has 0.down of shape \(2, 9\), want \(2, 8\)"),
    ({}, {B: torch.ones(2, 2)}, ValueError, r"has 0.up of shape \(2, 2\), want \(4, 2\)"),
    ({}, {"5.lora_A.weight": torch.ones(2, 8)}, ValueError, "is for 5, which the Sequential does"),
    ({}, {"1.lora_A.weight": torch.ones(2, 8)}, TypeError, "1 is a ReLU, want a linear layer"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "tensors", "error", "message"), BAD, ids=range(len(BAD)))
def test_checkpoints_that_are_refused(options, tensors, error, message, tmp_path):
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    plain, state = plain_state(model), copy_of_state(model)
    write_checkpoint(tmp_path, options, tensors)
    with pytest.raises(error, match=message) as caught:
        load_lora(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert plain_state(model) == plain and same_state(model, state)


def test_files_that_are_missing_or_damaged(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is no file"):
        load_lora(model, tmp_path)
    write_checkpoint(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        load_lora(model, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"no file; save the adapter with safe_serializat"):
        load_lora(model, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole)
    for text in ("{", "[]", "{}"):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json is no config of peft's"):
            load_lora(model, tmp_path)
    write_checkpoint(tmp_path)
    load_lora(model, tmp_path, name="mine")
    with pytest.raises(ValueError, match="'mine' is attached already"):
        load_lora(model, tmp_path, name="mine")
