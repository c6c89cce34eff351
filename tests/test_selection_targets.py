"""lift_groups: what LIFT trains in which model."""

import pytest
import torch
from torch import nn

from partune.optim import LiftAdamW, lift_groups

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def names(groups):
    return [name for group in groups for name, _ in group["params"]]


def tiny(kind):
    """A random model of an architecture, two layers of it."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=2)
    elif kind == "phi3":
        config = transformers.Phi3Config(
            **sizes, vocab_size=64, num_key_value_heads=2, pad_token_id=0
        )
    elif kind == "mixtral":
        config = transformers.MixtralConfig(
            **sizes, vocab_size=64, num_key_value_heads=2, num_local_experts=3
        )
    elif kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)
        return transformers.GPT2LMHeadModel(config)
    elif kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=64))
    else:
        return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("kind", "per_layer", "frozen"),
    [
        ("llama", 7, ("embed_tokens", "lm_head", "norm")),
        ("phi3", 4, ("embed_tokens", "lm_head", "norm")),
        ("gpt2", 4, ("wte", "wpe", "ln_", "bias")),
        ("bert", 6, ("embeddings", "pooler", "LayerNorm", "bias")),
        ("vit", 6, ("embeddings", "pooler", "layernorm", "bias")),
        ("mixtral", 6, ("embed_tokens", "lm_head", "norm", "router")),
    ],
)
def test_default_targets(kind, per_layer, frozen):
    model = tiny(kind)
    groups = lift_groups(model)
    assert len(names(groups)) == 2 * per_layer, names(groups)
    assert not any(part in name for name in names(groups) for part in frozen)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(names(groups))


def test_stacked_experts_are_taken_whole():
    model = tiny("mixtral")
    groups = lift_groups(model)
    stacks = [p for _, p in groups[0]["params"] if p.dim() == 3]
    assert len(stacks) == 4
    optimizer = LiftAdamW(groups, rank=2, density=0.1)
    optimizer.select()
    for stack in stacks:
        k = int(0.1 * stack[0].numel())
        assert optimizer.selected(stack).sum((1, 2)).tolist() == [k] * stack.shape[0]


def test_groups_carry_names_into_the_optimizer():
    optimizer = LiftAdamW(lift_groups(tiny("llama")), rank=4)
    record = optimizer.report()[0]
    assert record.name == "model.layers.0.self_attn.q_proj.weight" and record.shape == (32, 32)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 2),
        (("mlp.gate_proj", "self_attn.v_proj"), 4),
        (["model.layers.1.mlp.up_proj.weight"], 1),
        (r".*layers\.0\.mlp\..*_proj", 3),
        (["lm_head"], 1),
    ],
)
def test_targets_are_suffixes_or_one_expression(targets, count):
    model = tiny("llama")
    groups = lift_groups(model, targets)
    assert len(names(groups)) == count
    assert sum(p.requires_grad for p in model.parameters()) == count


def test_a_second_call_decides_anew():
    model = tiny("llama")
    lift_groups(model, ["q_proj"])
    assert len(names(lift_groups(model, ["gate_proj", "up_proj"]))) == 4


@pytest.mark.parametrize("targets", [["absent"], ["q_proj", "absent"], r"absent", []])
def test_nothing_matched_is_an_error_that_changes_nothing(targets):
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"targets: .* matched no matrix of LlamaForCausalLM"):
        lift_groups(model, targets)
    assert all(p.requires_grad for p in model.parameters())


def test_tied_weights_match_by_any_name_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "q_proj": nn.Linear(4, 8, bias=False)})
    model.q_proj.weight = model.embedding.weight
    groups = lift_groups(model)
    assert len(names(groups)) == 1 and model.embedding.weight.requires_grad


def test_quantised_weights_are_refused():
    model = nn.ModuleDict({"q_proj": nn.Module()})
    model.q_proj.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"q_proj.weight: got torch.uint8, want floating-point"):
        lift_groups(model)
