"""Faults of LIFT's released code, one regression test each."""

import pytest
import torch
from torch.nn import Parameter

import partune.selection.principal as principal
from lift_reference import principal_mask
from partune.optim import LiftAdamW, lift_groups


def matrix(rows=24, columns=36, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Parameter(torch.randn(rows, columns, generator=generator).to(dtype))


def stepped(weight, **options):
    optimizer = LiftAdamW([weight], **{"lr": 1e-2, "rank": 4, "density": 0.1, **options})
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(
        weight.dtype
    )
    optimizer.step()
    return optimizer


def test_the_default_selects_the_largest_entries_not_the_smallest():
    weight = matrix()
    before = weight.detach().clone()
    optimizer = stepped(weight)
    selected = optimizer.selected(weight)
    assert (selected == principal_mask(before, 4, 86)).all()
    left, singular_values, right = torch.linalg.svd(before)
    low_rank = ((left[:, :4] * singular_values[:4]) @ right[:4]).abs()
    assert low_rank[selected].min() > low_rank[~selected].max()


def test_selections_are_indices_beside_the_weights_not_masks():
    weight = matrix()
    state = stepped(weight).state[weight]
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert all(value.device == weight.device for value in tensors)
    assert not any(value.dtype == torch.bool for value in tensors)
    assert max(value.numel() for value in tensors) == 86  # k entries, not the matrix


def test_gradients_are_left_as_they_are():
    weight = matrix()
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    stepped(weight)
    assert torch.equal(weight.grad, grad)


def test_a_refresh_takes_no_svd_and_holds_no_low_rank_matrix(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an SVD was taken")

    for name in ("svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    monkeypatch.setattr(torch, "svd", refuse)
    proposals = []
    propose = principal.PrincipalWeights.propose

    def spy(self, *args):
        proposals.append(propose(self, *args))
        return proposals[-1]

    monkeypatch.setattr(principal.PrincipalWeights, "propose", spy)
    weight = matrix(rows=200, columns=300)
    stepped(weight)
    (proposal,) = proposals
    assert proposal.left.numel() + proposal.right.numel() == 4 * (200 + 300)


def test_weight_decay_reaches_the_weights():
    plain, decayed = matrix(), matrix()
    selected = stepped(plain).selected(plain)
    stepped(decayed, weight_decay=0.5)
    assert torch.allclose((plain - decayed)[selected], matrix()[selected] * 1e-2 * 0.5, atol=1e-6)
    assert torch.equal(plain[~selected], decayed[~selected])


def test_a_closure_runs_with_gradients():
    weight = matrix()
    optimizer = LiftAdamW([weight], rank=4, density=0.1)
    before = weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()  # raises where gradients are off
        return loss

    assert optimizer.step(closure).item() == pytest.approx((before**2).sum().item())
    assert (weight != before).sum() == 86


def test_every_group_is_read_with_its_own_options():
    first, second = matrix(), matrix(seed=2)
    groups = [{"params": [first]}, {"params": [second], "lr": 1.0, "density": 0.5, "rank": 2}]
    optimizer = LiftAdamW(groups, lr=1e-2, rank=4, density=0.1)
    before = [p.detach().clone() for p in (first, second)]
    for p in (first, second):
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [(p - b).detach().abs() for p, b in zip((first, second), before, strict=True)]
    assert [(m > 0).sum().item() for m in moved] == [86, 432]
    assert moved[0].max() < 0.02 < 0.5 < moved[1].max()
    assert (optimizer.selected(second) == principal_mask(before[1], 2, 432)).all()


def test_16_bit_weights_keep_float32_moments_and_a_float32_master():
    weight = matrix(dtype=torch.bfloat16)
    state = stepped(weight).state[weight]
    for name in ("exp_avg", "exp_avg_sq", "master"):
        assert state[name].dtype == torch.float32 and state[name].numel() == 86
    weight = Parameter(torch.ones(24, 36, dtype=torch.bfloat16))
    optimizer = LiftAdamW([weight], lr=1e-5, rank=4, density=0.1, refresh_interval=None)
    for _ in range(2000):  # each update is 1/390 of the last bit below 1
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight[optimizer.selected(weight)].max() < 0.99


def test_what_lift_does_not_train_is_frozen():
    model = torch.nn.ModuleDict(
        {
            "embed_tokens": torch.nn.Embedding(8, 8),
            "q_proj": torch.nn.Linear(8, 8),
            "norm": torch.nn.LayerNorm(8),
            "lm_head": torch.nn.Linear(8, 8),
        }
    )
    lift_groups(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["q_proj.weight"]
