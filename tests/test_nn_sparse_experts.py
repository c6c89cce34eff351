"""Sparse layers of stacked experts: beside transformers' own, and beside the optimizer route."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import use_experts_implementation

from op_cases import assert_close
from partune.nn import (
    SparseConfig,
    attach,
    detach,
    disable_adapter,
    load_adapter,
    merge,
    refresh,
    save_adapter,
    set_adapter,
    write_back_,
)
from partune.nn._sparse_experts import SparseExperts
from partune.ops.csr import mask_from_csr
from partune.ops.sparse_linear import sparse_grouped_linear
from partune.optim import SparseAdamW
from partune.selection import Magnitude, PrincipalWeights
from sparse_layers import Scattered

SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, head_dim=8,
    initializer_range=0.2,
)  # fmt: skip
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES)),  # transposed, with biases
}


class Plain:
    _experts_implementation = "batched_mm"


@use_experts_implementation(has_gate=False, has_post_expert_norm=True)
class UngatedExperts(nn.Module):
    """As NemotronH's, with Muse Spark's norm."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = 3
        self.up_proj = nn.Parameter(torch.randn(3, 10, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 10))
        self.act_fn, self.post_expert_norm = nn.GELU(), nn.LayerNorm(6)

    def forward(self, *args):
        raise NotImplementedError


def model_of(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = MODELS[kind]().to(dtype).eval()
    model.set_experts_implementation("eager")  # the others take no float64
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def ids(seed=0):
    return torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(seed))


def loss_of(model, seed=0):
    return model(input_ids=ids(seed), labels=ids(seed)).loss


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, SparseExperts)]


def parts_of(model):
    """Entries, and names of the weights that they belong to."""
    return {
        f"{name}.{weight}": entries
        for name, module in model.named_modules()
        if isinstance(module, SparseExperts)
        for weight, entries in module.adapter.items()
    }


def sparse(model, **options):
    options = {"selection": Scattered(), "density": 0.2, "target_modules": ["experts"], **options}
    return attach(model, SparseConfig(**options))


def values_of(model):
    return [entries.values for entries in parts_of(model).values()]


def mask_of(entries, weight):
    return mask_from_csr(*entries.csr, entries.columns).view_as(weight)


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_gradients_are_those_of_the_model(kind):
    plain = model_of(kind, torch.float64)
    model = sparse(copy.deepcopy(plain))
    plain.requires_grad_(True)
    losses = [loss_of(plain), loss_of(model)]
    assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    assert len(parts_of(model)) == 4
    for name, entries in parts_of(model).items():
        dense = plain.get_parameter(name)
        wanted = dense.grad[mask_of(entries, dense)]
        assert_close(entries.values.grad, wanted)
        assert wanted.abs().max() > 1e-6
        assert model.get_parameter(name).grad is None


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_experts_without_a_gate_and_with_a_norm_behind(tokens):
    torch.manual_seed(0)
    plain = nn.Sequential(UngatedExperts(Plain())).double()
    model = sparse(copy.deepcopy(plain), target_modules=["0"])
    x = torch.randn(tokens, 6, dtype=torch.float64)
    index = torch.rand(tokens, 3).argsort(1)[:, :2] // 2 * 2  # none for the second expert
    weights = torch.rand(tokens, 2, dtype=torch.float64)
    results = []
    for each in (plain, model):
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        output = each[0](inputs[0], index, inputs[1])
        output.sin().sum().backward()
        results.append((output, inputs[0].grad, inputs[1].grad))
    for wanted, mine in zip(*results, strict=True):
        assert_close(mine, wanted)
    for name, entries in model[0].adapter.items():
        weight = getattr(plain[0], name)
        assert_close(entries.values.grad, weight.grad[mask_of(entries, weight)])


def test_each_expert_is_a_matrix_of_its_own():
    model = model_of("mixtral")
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj[0] *= 100  # would take every entry of a selection over all of them
    sparse(model, selection=PrincipalWeights(3), density=0.1)
    entries = experts.adapter["down_proj"]
    mask = mask_of(entries, experts.down_proj)
    assert mask.sum((1, 2)).tolist() == [int(0.1 * 16 * 24)] * 4
    alone = PrincipalWeights(3).propose(experts.down_proj[2].detach(), None, {})
    scores = (alone.left @ alone.right).abs().flatten()
    wanted = scores >= scores.kthvalue(scores.numel() - 38 + 1).values
    assert torch.equal(mask[2].flatten(), wanted)


@pytest.mark.parametrize("kind", MODELS)
def test_same_training_as_the_optimizer_route(kind):
    """With refreshes: 50 steps, parameters within 1e-5."""
    plain = model_of(kind)
    model = sparse(copy.deepcopy(plain), selection=Magnitude())
    names = list(parts_of(model))
    plain.requires_grad_(False)
    stacked = [plain.get_parameter(name).requires_grad_() for name in names]
    options = dict(lr=1e-3, weight_decay=0.1)
    theirs = SparseAdamW(
        stacked, selection=Magnitude(), density=0.2, refresh_interval=20, **options
    )
    mine = torch.optim.AdamW(values_of(model), **options)
    for step in range(1, 51):
        for each, optimizer in ((plain, theirs), (model, mine)):
            loss_of(each, seed=step).backward()
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            refresh(model, mine)
    state = model.state_dict()
    start = model_of(kind).state_dict()
    for name in names:
        wanted = plain.get_parameter(name)
        assert (state[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert (wanted - start[name]).abs().max() > 1e-2


def test_what_was_there_comes_back(tmp_path):
    model = model_of("mixtral", torch.bfloat16)
    state, wanted = copy.deepcopy(model.state_dict()), model(ids()).logits
    sparse(model)
    optimizer = torch.optim.AdamW(values_of(model), lr=0.05)
    for step in range(3):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            assert refresh(model, optimizer, selection=Scattered(7)) < 1.0
    trained = model(ids()).logits
    assert not torch.equal(trained, wanted)
    with disable_adapter(model):
        assert torch.equal(model(ids()).logits, wanted)
    assert torch.equal(model(ids()).logits, trained)
    save_adapter(model, tmp_path / "adapter")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids()).logits, trained)
        assert values_of(copied)[0] is not values_of(model)[0]
    other = load_adapter(model_of("mixtral", torch.bfloat16), tmp_path / "adapter")
    assert torch.equal(other(ids()).logits, trained)
    merge(other)
    assert type(other.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    assert_close(other(ids()).logits, trained)  # by transformers' experts
    attach(model, SparseConfig(Magnitude(), density=0.1), name="all")
    set_adapter(model, "default")
    assert torch.equal(model(ids()).logits, trained)
    detach(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = sparse(model_of("gpt_oss"))
    gradients = []
    for options in (None, {"use_reentrant": reentrant}):
        if options is not None:
            model.train()
            model.gradient_checkpointing_enable(options)
            model.enable_input_require_grads()
        model.zero_grad()
        loss_of(model).backward()
        gradients.append([value.grad for value in values_of(model)])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_autocast_and_accumulation():
    model = sparse(model_of("mixtral"))
    loss_of(model).backward()
    exact = [value.grad.clone() for value in values_of(model)]
    loss_of(model).backward()
    for value, wanted in zip(values_of(model), exact, strict=True):
        assert_close(value.grad, 2 * wanted)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
    for value, wanted in zip(values_of(model), exact, strict=True):
        assert value.grad.dtype == torch.float32
        assert_close(value.grad, wanted, 5e-2)


def test_compiled():
    """The numbers of tokens are read back, so that a graph ends there."""
    experts = experts_of(sparse(model_of("gpt_oss")))[0]
    x, index = torch.randn(7, 16), torch.rand(7, 4).argsort(1)[:, :2]
    results = []
    for run in (experts, torch.compile(experts, backend="aot_eager")):
        experts.zero_grad()
        output = run(x, index, torch.ones(7, 2) / 2)
        output.square().sum().backward()
        results.append((output, *(entries.values.grad for entries in experts.adapter.values())))
    for wanted, mine in zip(*results, strict=True):
        assert_close(mine, wanted)


def test_no_dense_gradient_exists():
    """Nothing of the weight's size is made in a backward."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made = isinstance(result, torch.Tensor) and not func.is_view
            self.numel = max(self.numel, result.numel() if made else 0)
            return result

    experts = UngatedExperts(Plain())
    experts.up_proj = nn.Parameter(torch.randn(3, 100, 60))
    experts.down_proj = nn.Parameter(torch.randn(3, 60, 100))
    experts.post_expert_norm = nn.LayerNorm(60)
    model = sparse(nn.Sequential(experts), target_modules=["0"], density=0.05)
    x = torch.randn(4, 60, requires_grad=True)
    output = model[0](x, torch.tensor([[0, 2]] * 4), torch.rand(4, 2))
    with Largest() as largest:
        output.sum().backward()
    assert 100 <= largest.numel < 60 * 100


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(transposed):
    torch.manual_seed(0)
    weight = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask.view(3, -1)[:, ::3] = True
    bias = torch.randn(3, 4 if transposed else 5, dtype=torch.float64, requires_grad=True)
    rows = mask.view(15, 4).sum(1).cumsum(0)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), rows])
    col = mask.view(15, 4).nonzero()[:, 1].to(torch.int32)
    values = weight[mask].requires_grad_()
    x = torch.randn(6, 5 if transposed else 4, dtype=torch.float64, requires_grad=True)

    def run(x, bias, values):
        written = weight.clone()
        written[mask] = values.detach()
        sizes = [2, 0, 4]
        return sparse_grouped_linear(
            x, written, bias, values, crow, col, sizes, transposed=transposed
        )

    assert torch.autograd.gradcheck(run, (x, bias, values))
    output = run(x, bias, values)
    with pytest.raises(RuntimeError, match="sparse_linear has no second derivative"):
        torch.autograd.grad(output.square().sum(), values, create_graph=True)


def test_refused():
    model = sparse(model_of("mixtral"))
    experts = experts_of(model)[0]
    experts._is_expert_parallel = True
    with pytest.raises(RuntimeError, match="experts: got some that are spread over devices"):
        loss_of(model)
    experts._is_expert_parallel = False
    with torch.no_grad():
        experts.adapter["down_proj"].values += 1
    with pytest.raises(RuntimeError, match=r"call partune.nn.write_back_\(model\)"):
        loss_of(model)
    write_back_(model)
    loss_of(model)
    experts = UngatedExperts(Plain())
    experts.up_proj = nn.Parameter(torch.randn(3, 6, 10).transpose(1, 2))
    with pytest.raises(ValueError, match=r"0: got strides .* want a contiguous weight"):
        sparse(nn.Sequential(experts), target_modules=["0"])
    weight, csr = torch.ones(2, 3, 3), (torch.zeros(7, dtype=torch.int64), torch.ones(0).int())
    with pytest.raises(ValueError, match=r"sizes: got \[1, 1\], want 2 numbers.* input's 3"):
        sparse_grouped_linear(torch.ones(3, 3), weight, None, torch.ones(0), *csr, [1, 1])


def test_a_file_with_entries_of_another_expert(tmp_path):
    """As many in all, but not in each."""
    model = sparse(model_of("mixtral"))
    entries = experts_of(model)[0].adapter["down_proj"]
    crow, col = entries.crow_indices, entries.col_indices
    counts, first = crow.diff(), int(crow[16])
    counts[14] += counts[15]  # Scattered takes none of a last row
    assert counts[15] == 0 and counts[16] > 0
    crow[16] += 1  # the second expert's first entry becomes one of the first expert's last row
    col[first + 1 : crow[17]] = torch.arange(1, int(crow[17]) - first)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"experts, .*got \[77, 75, 76, 76\] entries"):
        load_adapter(model_of("mixtral"), tmp_path / "adapter")
