"""The optimizer and its selections beside a plain-torch LIFT, on a small Llama and on SmolLM2."""

import sys
from pathlib import Path

import pytest
import torch

from lift_reference import LiftReference, principal_mask, topk_mask
from partune.ops.csr import mask_from_csr
from partune.optim import LiftAdamW, SparseAdamW, lift_groups
from partune.selection import PrincipalWeights, topk_csr

REPOSITORY = Path(__file__).resolve().parent.parent
KINDS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def small_llama(dtype):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def backward(model, tokens):
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()


@pytest.mark.parametrize("eps_mode", ["uncorrected", "corrected"])
def test_sixty_steps_agree_with_plain_torch_lift(eps_mode):
    model, twin = small_llama(torch.float64), small_llama(torch.float64)
    common = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.01)
    settings = dict(rank=16, density=0.05, refresh_interval=20, eps_mode=eps_mode)
    optimizer = LiftAdamW(lift_groups(model), **common, **settings)
    reference = LiftReference(
        [parameter for _, parameter in lift_groups(twin)[0]["params"]], **common, **settings
    )
    before = [parameter.detach().clone() for parameter in reference.parameters]
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        tokens = torch.randint(0, 128, (4, 16), generator=generator)
        backward(model, tokens)
        optimizer.step()
        backward(twin, tokens)
        reference.step()
    pairs = zip(optimizer.param_groups[0]["params"], reference.parameters, strict=True)
    differences = torch.cat([(a - b).detach().abs().flatten() for a, b in pairs])
    assert (differences <= 1e-6).double().mean() >= 0.995
    moved = zip(before, reference.parameters, strict=True)
    assert max((a - b).abs().max() for a, b in moved) > 1e-3  # or nothing was compared
    assert all(record.kept_share < 1 for record in optimizer.report())  # selections changed


def test_recorded_gradients_in_float32_with_a_given_csr():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(129, 200, generator=generator)
    grads = torch.randn(60, 129, 200, generator=generator)
    k = int(0.05 * weight.numel())

    class Given(PrincipalWeights):
        def propose(self, weight, grad, state):
            from partune.selection import Scores

            return Scores(given.to(weight.dtype))

    given = topk_mask(torch.rand(weight.shape, generator=generator), k)
    settings = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, density=0.05)
    settings |= dict(eps_mode="uncorrected", refresh_interval=1000)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = SparseAdamW([parameter], selection=Given(), **settings)
    oracle = torch.nn.Parameter(weight.double())
    reference = LiftReference([oracle], rank=1, **settings)
    reference._select = lambda: reference.masks.__setitem__(0, given)
    for grad in grads:
        parameter.grad, oracle.grad = grad, grad.double()
        optimizer.step()
        reference.step()
    assert (optimizer.selected(parameter) == given).all()
    assert (parameter.double() - oracle).abs().max() <= 1e-5


@pytest.fixture(scope="session")
def smollm2():
    """The folder of SmolLM2-135M-Instruct, made on first use."""
    sys.path.insert(0, str(REPOSITORY / "examples"))
    try:
        from offline_models import offline_model

        return offline_model()
    except (ImportError, OSError) as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")
    finally:
        sys.path.remove(str(REPOSITORY / "examples"))


@pytest.mark.parametrize("layer", [3, 29])
def test_principal_weights_of_smollm2_agree_with_a_float64_svd(smollm2, layer):
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(smollm2 / "model.safetensors", "pt") as file:
        weights = [file.get_tensor(f"model.layers.{layer}.{kind}.weight") for kind in KINDS]
    for kind, weight in zip(KINDS, weights, strict=True):
        k = int(0.05 * weight.numel())
        proposal = PrincipalWeights(rank=128).propose(weight.float(), None, {})
        mask = mask_from_csr(*topk_csr(proposal, k), weight.shape[1])
        shared = (mask & principal_mask(weight, 128, k)).sum() / k
        assert mask.sum() == k
        assert shared >= 0.995, f"{kind}: {shared:.4f}"
