"""Selections: what each proposes, exactly k of it, and their errors."""

import copy
import pickle

import pytest
import torch

from lift_reference import principal_mask, topk_mask
from partune.ops.csr import mask_from_csr
from partune.selection import (
    Factors,
    GradientMagnitude,
    Magnitude,
    Movement,
    PrincipalWeights,
    Random,
    Scores,
    Selection,
    topk_csr,
)

ALL = [PrincipalWeights(3), Magnitude(), GradientMagnitude(), Movement(), Random(5)]


def mask_of(selection, weight, k, grad=None, step=1):
    state = {**selection.init(weight), "parameter_id": 0, "step": step}
    if grad is not None:
        selection.observe_(weight, grad, state)
    crow_indices, col_indices = topk_csr(selection.propose(weight, grad, state), k)
    assert crow_indices.dtype == torch.int64 and col_indices.dtype == torch.int32
    return mask_from_csr(crow_indices, col_indices, weight.shape[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (129, 40), (40, 129), (64, 64)])
@pytest.mark.parametrize("selection", ALL, ids=lambda s: type(s).__name__)
def test_exactly_k_entries(selection, shape, dtype):
    weight, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    for k in (0, weight.numel() // 3, weight.numel()):
        assert mask_of(selection, weight, k, grad).sum() == k


@pytest.mark.parametrize("shape", [(50, 80), (80, 50), (60, 60)])
@pytest.mark.parametrize("rank", [1, 7, 49])
def test_principal_weights_are_those_of_the_svd(shape, rank):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(rank)).double()
    k = weight.numel() // 20
    proposal = PrincipalWeights(rank).propose(weight, None, {})
    assert isinstance(proposal, Factors) and proposal.left.shape[1] == rank
    assert (mask_of(PrincipalWeights(rank), weight, k) == principal_mask(weight, rank, k)).all()


@pytest.mark.parametrize("rank", [50, 51, 1000])
def test_full_rank_is_the_matrix_itself(rank):
    weight = torch.randn(50, 80)
    proposal = PrincipalWeights(rank).propose(weight, None, {})
    assert isinstance(proposal, Scores) and (proposal.values == weight.abs()).all()


def test_principal_weights_beside_a_few_outliers():
    """Squared singular values span 1e9 here: a Gram matrix in float32 would lose the small ones."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 80, generator=generator)
    weight[:3, :3] += 1e5
    shared = mask_of(PrincipalWeights(20), weight, 240) & principal_mask(weight, 20, 240)
    assert shared.sum() / 240 >= 0.995


def test_principal_weights_are_the_same_bits_twice():
    weight = torch.randn(70, 90)
    first, second = (PrincipalWeights(8).propose(weight, None, {}) for _ in range(2))
    assert torch.equal(first.left, second.left) and torch.equal(first.right, second.right)


def test_the_number_of_threads_stays_what_it_was():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        PrincipalWeights(2).propose(torch.randn(8, 9), None, {})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_magnitude_and_gradient_magnitude_in_both_directions():
    weight = torch.tensor([[1.0, -4.0, 2.0], [-3.0, 0.0, 5.0]])
    grad = -weight.flip(1)
    assert mask_of(Magnitude(), weight, 2).tolist() == [[False, True, False], [False, False, True]]
    smallest = mask_of(Magnitude(largest=False), weight, 2)
    assert smallest.tolist() == [[True, False, False], [False, True, False]]
    assert (mask_of(GradientMagnitude(), weight, 2, grad) == topk_mask(grad.abs(), 2)).all()


def test_movement_sums_over_steps():
    weight = torch.randn(6, 7)
    grads = torch.randn(5, 6, 7)
    movement = Movement()
    state = movement.init(weight)
    for grad in grads:
        movement.observe_(weight, grad, state)
    expected = -(grads * weight).sum(0)
    assert torch.allclose(state["movement"], expected, atol=1e-6)
    mask = mask_from_csr(*topk_csr(movement.propose(weight, None, state), 10), 7)
    assert (mask == topk_mask(expected, 10)).all()


def test_movement_outlives_a_nan():
    weight, movement = torch.ones(2, 2), Movement()
    state = movement.init(weight)
    movement.observe_(weight, torch.tensor([[float("nan"), float("inf")], [-1.0, 1.0]]), state)
    assert state["movement"].tolist() == [[0.0, 0.0], [1.0, -1.0]]


def test_random_depends_on_seed_step_and_parameter():
    weight = torch.ones(30, 40)
    base = Random(1).propose(weight, None, {"parameter_id": 0, "step": 1}).values
    again = Random(1).propose(weight, None, {"parameter_id": 0, "step": 1}).values
    assert torch.equal(base, again) and base.min() >= 0 and base.max() < 1
    for selection, state in (
        (Random(2), {"parameter_id": 0, "step": 1}),
        (Random(1), {"parameter_id": 1, "step": 1}),
        (Random(1), {"parameter_id": 0, "step": 2}),
    ):
        assert not torch.equal(base, selection.propose(weight, None, state).values)
    assert base.mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_selection_needs_no_base_class():
    class TopRow:
        def init(self, weight):
            return {}

        def observe_(self, weight, grad, state):
            pass

        def propose(self, weight, grad, state):
            return Scores(torch.arange(weight.numel(), 0, -1.0).view(weight.shape))

    assert isinstance(TopRow(), Selection)
    weight = torch.nn.Parameter(torch.randn(4, 5))
    from partune.optim import SparseAdamW

    optimizer = SparseAdamW([weight], selection=TopRow(), density=0.25)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert optimizer.selected(weight)[0].all() and not optimizer.selected(weight)[1:].any()


@pytest.mark.parametrize("selection", ALL, ids=lambda s: type(s).__name__)
def test_selections_copy_pickle_compare_and_are_frozen(selection):
    assert copy.deepcopy(selection) == selection == pickle.loads(pickle.dumps(selection))
    assert hash(selection) == hash(copy.deepcopy(selection))
    with pytest.raises(AttributeError):
        selection.rank = 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PrincipalWeights(0), ValueError, "rank: got 0, want at least 1"),
        (lambda: PrincipalWeights(2.5), TypeError, "rank: got 2.5, want an int"),
        (lambda: Random("x"), TypeError, "seed: got 'x', want an int"),
        (lambda: Random(2**63), ValueError, "seed: got .*, want 64 bits"),
        (
            lambda: GradientMagnitude().propose(torch.ones(2, 2), None, {}),
            ValueError,
            "GradientMagnitude selects by gradients and got none",
        ),
        (
            lambda: Movement().propose(torch.ones(2, 2), None, Movement().init(torch.ones(2, 2))),
            ValueError,
            "Movement has observed no gradient yet",
        ),
        (
            lambda: PrincipalWeights(1).propose(torch.full((2, 2), float("nan")), None, {}),
            ValueError,
            "weight: got NaN",
        ),
        (lambda: topk_csr(torch.ones(2, 2), 1), TypeError, "proposal: got Tensor"),
        (lambda: topk_csr(Scores(torch.ones(2, 2)), 5), ValueError, "k: got 5, want 0 <= k <= 4"),
    ],
)
def test_errors_say_what_was_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()
