"""partune's methods in peft: every verb of peft's on small models, beside `partune.nn.attach`."""

import copy
import pickle
import warnings

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftConfig, PeftModel, TaskType, get_peft_model

from nn_models import OWN, torchs_products
from partune.integrations.peft import BlockLoRAPeftConfig, ScaleShiftPeftConfig
from partune.nn import BlockLoRAConfig, ScaleShiftConfig, attach
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

METHODS = {
    "scale_shift": (ScaleShiftConfig, ScaleShiftPeftConfig, dict(init_std=0.2)),
    "block_lora": (BlockLoRAConfig, BlockLoRAPeftConfig, dict(rank=4, blocks=2)),
}
KINDS = ["vit", "dinov2", "swin", "convnext", "clip", "llama", "gpt2", "bert", *OWN]


def each(*kinds):
    """Every method on models of these kinds, where it has layers to go to."""
    cases = [(m, k) for k in kinds for m in METHODS if (m, k) != ("block_lora", "convnet")]
    return pytest.mark.parametrize(("method", "kind"), cases)


@pytest.fixture(autouse=True)
def no_warnings():
    """peft warns where a user has to look: of keys that it didn't find, of unmerged layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is deprecated in transformers and torch
        warnings.simplefilter("error", UserWarning)
        yield


def config(method="scale_shift", **options):
    _, kind, usual = METHODS[method]
    return kind(**{**usual, **options})


@each(*KINDS, "gemma")
def test_computes_what_attach_computes_and_trains_it_alone(method, kind):
    model, run = model_and_output(kind)
    base, attached = run(model), copy.deepcopy(model)
    torch.manual_seed(1)
    kind, _, options = METHODS[method]
    move_ups(attach(attached, kind(**options)))
    torch.manual_seed(1)
    tuned = in_peft(model, config(method))
    # attach alone gives a head the faster product, which rounds otherwise
    with torchs_products():
        assert torch.equal(run(tuned), run(attached))
    assert relative(run(tuned), base) > 1e-2, "the adapter does something"
    trained = sum(p.numel() for p in attached.parameters() if p.requires_grad)
    assert tuned.get_nb_trainable_parameters()[0] == trained


@each(*KINDS)
def test_saved_loaded_merged_and_unloaded(method, kind, tmp_path):
    model, run = model_and_output(kind)
    base, plain, state = run(model), plain_state(model), copy_of_state(model)
    fresh = copy.deepcopy(model)
    tuned = in_peft(model, config(method))
    with_adapter = run(tuned)
    with tuned.disable_adapter():
        assert torch.equal(run(tuned), base)
    assert torch.equal(run(tuned), with_adapter)

    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(run(loaded), with_adapter)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())

    merged = tuned.merge_and_unload()
    assert plain_state(merged) == plain
    assert relative(run(merged), with_adapter) <= TOLERANCE
    unloaded = loaded.unload()
    assert plain_state(unloaded) == plain
    assert same_state(unloaded, state) and torch.equal(run(unloaded), base)


@each("vit", "convnext", "llama", "convnet")
def test_merging_in_place_is_undone_bit_for_bit(method, kind):
    model, run = model_and_output(kind)
    tuned = in_peft(model, config(method))
    state, with_adapter = copy_of_state(tuned), run(tuned)
    tuned.merge_adapter(safe_merge=True)
    assert relative(run(tuned), with_adapter) <= TOLERANCE
    tuned.unmerge_adapter()
    assert same_state(tuned, state) and torch.equal(run(tuned), with_adapter)
    tuned.merge_adapter()
    with tuned.disable_adapter():
        pass
    assert same_state(tuned, state) and torch.equal(run(tuned), with_adapter)
    tuned.merge_adapter()
    merged = run(tuned)
    assert torch.equal(run(tuned.merge_and_unload()), merged)


@each("vit", "llama", "timm-convnext")
def test_several_adapters(method, kind, tmp_path):
    model, run = model_and_output(kind)
    base, fresh = run(model), copy.deepcopy(model)
    tuned = in_peft(model, config(method), "first")
    first = run(tuned)
    some = r".*(v_proj|mlp.fc1)"
    tuned.add_adapter("second", config(method, target_modules=some, modules_to_save=[]))
    move_ups(tuned, "second")
    assert torch.equal(run(tuned), first)
    tuned.set_adapter("second")
    second = run(tuned)
    assert min(relative(second, first), relative(second, base)) > 1e-3
    assert all(".second." in n for n, p in tuned.named_parameters() if p.requires_grad)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "second", adapter_name="second")
    assert torch.equal(run(loaded), second)
    loaded.load_adapter(tmp_path / "first", adapter_name="first")
    assert torch.equal(run(loaded), second)
    loaded.set_adapter("first")
    assert torch.equal(run(loaded), first)
    loaded.delete_adapter("second")
    assert torch.equal(run(loaded), first) and list(loaded.peft_config) == ["first"]
    assert relative(run(tuned.merge_and_unload()), second) <= TOLERANCE


@each("gpt2")
def test_a_second_adapter_merged_by_name(method, kind):
    model, run = model_and_output(kind)
    tuned = in_peft(model, config(method, target_modules=["c_attn"]))
    tuned.add_adapter("second", config(method))
    move_ups(tuned, "second").set_adapter("second")
    second = run(tuned)
    tuned.set_adapter("default")
    assert relative(run(tuned.merge_and_unload(adapter_names=["second"])), second) <= TOLERANCE


@each("vit", "llama", "convnet")
def test_copies_and_pickles(method, kind):
    model, run = model_and_output(kind)
    tuned = in_peft(model, config(method))
    wanted, state = run(tuned), copy_of_state(tuned)
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert torch.equal(run(other), wanted)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        assert not torch.equal(run(other), wanted)
        assert relative(run(other.merge_and_unload()), wanted) > 1e-2
    assert torch.equal(run(tuned), wanted) and same_state(tuned, state)


@each("llama")
def test_loading_on_empty_weights_and_beside_16_bits(method, kind, tmp_path):
    model, run = model_and_output(kind)
    model = model.bfloat16()
    fresh = copy.deepcopy(model)
    tuned = in_peft(model, config(method))
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(run(loaded), run(tuned))
    adapters = [p for n, p in loaded.named_parameters() if f".{method}." in n]
    assert adapters and all(p.dtype == torch.float32 for p in adapters)
    assert {p.dtype for n, p in loaded.named_parameters() if "base_layer" in n} == {torch.bfloat16}


@each("timm-vit")
def test_gradients_reach_the_adapter_alone(method, kind):
    model, _ = model_and_output(kind)
    attached = copy.deepcopy(model)
    torch.manual_seed(1)
    kind, _, options = METHODS[method]
    move_ups(attach(attached, kind(**options)))
    torch.manual_seed(1)
    tuned = in_peft(model, config(method))
    images = torch.randn(2, 3, 16, 16)
    for trained in (attached, tuned):
        trained(images).square().sum().backward()
    wanted = [p.grad for p in attached.parameters() if p.requires_grad]
    got = {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad}
    assert len(got) == len(wanted) and all(".default." in name for name in got)
    norms = sorted(float(g.norm()) for g in got.values())
    assert norms == pytest.approx(sorted(float(g.norm()) for g in wanted), rel=1e-5)
    frozen = [p.grad for p in tuned.parameters() if not p.requires_grad]
    assert frozen and all(grad is None for grad in frozen)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", [TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS])
def test_heads_that_peft_adds_by_the_task(method, task, tmp_path):
    import transformers

    from nn_models import LANGUAGE, SIZES

    kind = {
        TaskType.SEQ_CLS: transformers.BertForSequenceClassification,
        TaskType.TOKEN_CLS: transformers.BertForTokenClassification,
        TaskType.QUESTION_ANS: transformers.BertForQuestionAnswering,
    }[task]
    torch.manual_seed(0)
    model = kind(transformers.BertConfig(**SIZES, **LANGUAGE)).eval()
    fresh = copy.deepcopy(model)
    tuned = get_peft_model(model, config(method, task_type=task)).eval()
    head = "qa_outputs" if task == TaskType.QUESTION_ANS else "classifier"
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert any(f"{head}.modules_to_save.default.weight" in name for name in trained)
    tokens = torch.randint(3, 50, (2, 5))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name in trained:
                parameter.add_(0.1)
        wanted = tuned(input_ids=tokens)[0]
        tuned.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(fresh, tmp_path)
        assert torch.equal(loaded(input_ids=tokens)[0], wanted)


@each("llama")
def test_through_transformers_own_methods(method, kind, tmp_path):
    model, run = model_and_output(kind)
    base, fresh = run(model), copy.deepcopy(model)
    model.add_adapter(config(method))
    with_adapter = run(move_ups(model))
    assert relative(with_adapter, base) > 1e-2
    model.disable_adapters()
    assert torch.equal(run(model), base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    fresh.load_adapter(str(tmp_path))
    assert torch.equal(run(fresh), with_adapter)


@each("llama")
def test_trainer_takes_two_steps_and_resumes(method, kind, tmp_path):
    from transformers import Trainer, TrainingArguments

    model, run = model_and_output(kind)
    fresh = copy.deepcopy(model)
    tuned = in_peft(model, config(method, task_type="CAUSAL_LM"))
    start = copy_of_state(tuned)
    rows = [{"input_ids": t, "labels": t} for t in torch.randint(3, 50, (8, 6))]

    def trainer(trained, steps):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=1, report_to="none",
            per_device_train_batch_size=2, learning_rate=1e-2, disable_tqdm=True, use_cpu=True,
            lr_scheduler_type="constant", dataloader_pin_memory=False,
        )  # fmt: skip
        return Trainer(model=trained, args=arguments, train_dataset=rows)

    trainer(tuned, 2).train()
    changed = {n for n, value in tuned.state_dict().items() if not torch.equal(value, start[n])}
    assert changed == {name for name in start if f".{method}." in name}
    loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "checkpoint-2")
    assert torch.equal(run(loaded), run(tuned.eval()))
    again = in_peft(fresh, config(method, task_type="CAUSAL_LM"))
    trainer(again, 2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert relative(run(again.eval()), run(tuned)) <= TOLERANCE


@each("llama")
def test_compiled_whole_and_checkpointed(method, kind):
    model, _ = model_and_output(kind)
    tuned = in_peft(model, config(method, task_type="CAUSAL_LM"))
    tokens = torch.randint(3, 50, (2, 5))

    def gradients(trained):
        trained(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        found = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
        tuned.zero_grad()
        return found

    wanted = gradients(tuned)
    assert wanted and all(f".{method}." in name for name in wanted)
    compiled = gradients(torch.compile(tuned, fullgraph=True, backend="aot_eager"))
    tuned.gradient_checkpointing_enable()
    tuned.enable_input_require_grads()
    for got in (compiled, gradients(tuned.train())):
        assert got.keys() == wanted.keys()
        assert all(relative(got[name], grad) <= TOLERANCE for name, grad in wanted.items())


# ---- merging: the config's biases, and what can't be merged ----


def test_a_bias_that_the_config_can_express():
    model, run = model_and_output("llama")
    tuned = get_peft_model(model, config(target_modules=["q_proj", "v_proj"], shift=True))
    with_adapter = run(tuned)
    merged = tuned.merge_and_unload()
    assert merged.config.attention_bias and not merged.config.mlp_bias
    layer = merged.model.layers[0].self_attn
    assert layer.o_proj.bias is not None and not layer.o_proj.bias.any()
    assert relative(run(merged), with_adapter) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gemma", {}, "input_layernorm: a GemmaRMSNorm computes its output in a way of its own"),
        ("llama", dict(target_modules=["norm"], shift=True), "model.norm: a LlamaRMSNorm has no"),
        ("gpt2", dict(target_modules=["lm_head"]), "lm_head: its weight is shared with another"),
        ("qwen2", dict(target_modules=["down_proj"], shift=True), "can't express this bias"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_changes(kind, options, message):
    heads = dict(num_key_value_heads=2) if kind == "qwen2" else {}
    model, run = model_and_output(kind, **heads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own words on tied weights
        tuned = get_peft_model(model, config(**options))
        wanted, state = run(tuned), copy_of_state(tuned)
        with pytest.raises(ValueError, match=message):
            tuned.merge_and_unload()
    assert same_state(tuned, state) and torch.equal(run(tuned), wanted)


def test_two_adapters_are_not_merged_into_one():
    model, run = model_and_output("llama")
    tuned = get_peft_model(model, config())
    tuned.add_adapter("second", config())
    wanted = run(tuned)
    with pytest.raises(ValueError, match=r"got \['default', 'second'\], want one: a ScaleShiftM"):
        tuned.merge_adapter(adapter_names=["default", "second"])
    with pytest.raises(
        ValueError, match=r"got \['third'\], want a list of some of \['default', 's"
    ):
        tuned.merge_and_unload(adapter_names=["third"])
    with pytest.raises(ValueError, match=r"got 'second', want a list of some of"):
        tuned.merge_adapter("second")
    with pytest.raises(
        ValueError, match=r"adapter_names: a ScaleShiftModel computes with one .*mixed"
    ):
        tuned(input_ids=torch.ones(2, 3, dtype=torch.long), adapter_names=["default", "second"])
    with pytest.raises(ValueError, match=r"got \['default', 'second'\], want one"):
        tuned.base_model.set_adapter(["default", "second"])
    assert torch.equal(run(tuned), wanted)


def test_safe_merging_finds_what_is_not_finite():
    model, _ = model_and_output("llama")
    tuned = get_peft_model(model, config())
    with torch.no_grad():
        tuned.get_submodule("base_model.model.model.layers.0.self_attn.k_proj").adapters[
            "default"
        ].scale[0] = float("nan")
    state = copy_of_state(tuned)
    with pytest.raises(ValueError, match="k_proj: merging 'default' gives NaN or infinity"):
        tuned.merge_adapter(safe_merge=True)
    own = tuned.state_dict()
    assert all(torch.equal(own[k].nan_to_num(), v.nan_to_num()) for k, v in state.items())


def test_the_config_file_says_what_was_chosen(tmp_path):
    model, _ = model_and_output("timm-vit")
    get_peft_model(model, config()).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is ScaleShiftPeftConfig and loaded.init_std == 0.2
    assert loaded.modules_to_save == ["head"] and "blocks.1.mlp.fc1" in loaded.target_modules
    assert "head" not in loaded.target_modules
