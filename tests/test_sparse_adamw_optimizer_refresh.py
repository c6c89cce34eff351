"""When SparseAdamW selects, and what a refresh keeps."""

import pytest
import torch
from torch.nn import Parameter

from partune.ops import gather_csr
from partune.optim import LiftAdamW, SparseAdamW
from partune.selection import GradientMagnitude, Magnitude, Movement, PrincipalWeights, Random


def matrix(rows=20, columns=30, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return Parameter(torch.randn(rows, columns, generator=generator, dtype=dtype))


def step(optimizer, *parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()


def test_nothing_is_selected_before_the_first_step():
    weight = matrix()
    optimizer = SparseAdamW([weight], selection=Magnitude())
    assert not optimizer.selected(weight).any() and not optimizer.state
    step(optimizer, weight)
    assert optimizer.selected(weight).sum() == 30


@pytest.mark.parametrize(
    ("interval", "selecting"), [(3, [1, 3, 6]), (1, [1, 2, 3, 4, 5, 6, 7]), (None, [1]), (0, [1])]
)
def test_steps_that_select(interval, selecting):
    seen = []

    class Spy(Magnitude):
        def propose(self, weight, grad, state):
            seen.append(state["step"])
            return super().propose(weight, grad, state)

    weight = matrix()
    optimizer = SparseAdamW([weight], selection=Spy(), refresh_interval=interval)
    for t in range(7):
        step(optimizer, weight, seed=t)
    assert seen == selecting


def test_selection_is_made_from_the_weights_before_the_update():
    weight = matrix()
    k = 30
    before = set(weight.detach().abs().flatten().topk(k).indices.tolist())
    optimizer = SparseAdamW([weight], lr=100.0, selection=Magnitude())
    step(optimizer, weight)
    assert set(optimizer.selected(weight).flatten().nonzero().flatten().tolist()) == before


def test_a_refresh_keeps_moments_where_selections_meet_and_nothing_else():
    weight = matrix()
    optimizer = SparseAdamW([weight], lr=0.1, selection=Random(1), density=0.4, weight_decay=0.0)
    step(optimizer, weight)
    old, state = optimizer.selected(weight), dict(optimizer.state[weight])
    columns = weight.shape[1]
    dense = torch.full_like(weight, float("nan"))
    dense.detach()[old] = state["exp_avg"]
    step(optimizer, weight, seed=1)
    values = weight.detach().clone()
    dense.detach()[old] = optimizer.state[weight]["exp_avg"]

    optimizer.select()
    new, state = optimizer.selected(weight), optimizer.state[weight]
    carried = gather_csr(dense.detach(), state["crow_indices"], state["col_indices"])
    in_both = old[new]
    assert 0 < in_both.sum() < in_both.numel() and columns == 30
    assert (state["exp_avg"][in_both] == carried[in_both]).all()
    assert (state["exp_avg"][~in_both] == 0).all() and (state["exp_avg_sq"][~in_both] == 0).all()
    assert int(state["kept_entries"]) == in_both.sum()
    assert (weight == values).all()
    assert state["step"] == 2

    step(optimizer, weight, seed=2)
    assert (weight[~new] == values[~new]).all()  # deselected weights keep their trained value
    assert (weight[new] != values[new]).all()


def test_the_first_update_of_a_new_entry():
    weight = matrix()
    optimizer = LiftAdamW([weight], lr=1e-3, rank=4, density=0.5, eps=0.0, refresh_interval=None)
    for t in range(300):
        step(optimizer, weight, seed=t)
    before = weight.detach().clone()
    for p in (weight,):
        p.data = p.data * torch.randn(p.shape, generator=torch.Generator().manual_seed(9))
    old, before = optimizer.selected(weight), weight.detach().clone()
    optimizer.select()
    step(optimizer, weight, seed=300)
    new = optimizer.selected(weight) & ~old
    moved = (weight - before)[new].abs().detach()
    expected = (1 - 0.9) / (1 - 0.95) ** 0.5 * 1e-3  # 0.447·lr
    assert new.sum() > 20
    assert torch.allclose(moved, torch.full_like(moved, expected), rtol=1e-5)


def test_zero_rate_and_zero_gradient_change_and_select_nothing():
    weight, bias = matrix(), Parameter(torch.ones(4))
    optimizer = SparseAdamW([weight, bias], lr=0.0, selection=Random(), refresh_interval=1)
    for p in (weight, bias):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not optimizer.state
    step(optimizer, weight, bias)  # a warm-up's first step: rate 0, gradients all the same
    selected, moment = optimizer.selected(weight), optimizer.state[weight]["exp_avg"].clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert (optimizer.selected(weight) == selected).all()
    assert (optimizer.state[weight]["exp_avg"] == moment).all()
    assert optimizer.state[weight]["step"] == 1


def test_select_on_demand_does_not_step():
    weight, other = matrix(), matrix(seed=1)
    optimizer = SparseAdamW([weight, other], selection=PrincipalWeights(4))
    before = weight.detach().clone()
    optimizer.select()
    assert optimizer.selected(weight).sum() == 30 and optimizer.state[weight]["step"] == 0
    assert (weight == before).all()
    step(optimizer, weight, other)
    assert optimizer.state[weight]["step"] == 1


def test_tied_weights_have_one_selection():
    embedding, head = torch.nn.Embedding(10, 6), torch.nn.Linear(6, 10, bias=False)
    head.weight = embedding.weight
    model = torch.nn.ModuleList([embedding, head])
    optimizer = SparseAdamW(model.parameters(), lr=0.1, selection=Magnitude(), density=0.25)
    head(embedding(torch.arange(10))).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 1 and optimizer.state[head.weight]["step"] == 1


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
def test_a_parameter_listed_twice_is_stepped_once():
    weight = matrix()
    optimizer = SparseAdamW([weight, weight], selection=Magnitude())
    step(optimizer, weight)
    assert optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize(
    "selection", [Magnitude(), PrincipalWeights(3), Random(), Movement(), GradientMagnitude()]
)
def test_stacked_experts_are_selected_per_slice(selection):
    experts = Parameter(torch.randn(4, 10, 15, dtype=torch.float64))
    experts.data[0] *= 100  # would take every entry of a selection over all slices
    optimizer = SparseAdamW([experts], selection=selection, density=0.1, refresh_interval=2)
    before = experts.detach().clone()
    for t in range(3):
        step(optimizer, experts, seed=t)
        mask = optimizer.selected(experts)
        assert mask.shape == experts.shape
        assert mask.sum((1, 2)).tolist() == [15] * 4
    assert not (mask[0] == mask[1]).all()
    assert (experts != before).any()


def test_a_slice_is_selected_as_a_matrix_of_its_own():
    experts = Parameter(torch.randn(3, 10, 15, dtype=torch.float64))
    optimizer = SparseAdamW([experts], selection=PrincipalWeights(3), density=0.1)
    optimizer.select()
    for i in range(3):
        single = Parameter(experts.detach()[i].clone())
        alone = SparseAdamW([single], selection=PrincipalWeights(3), density=0.1)
        alone.select()
        assert (alone.selected(single) == optimizer.selected(experts)[i]).all()


def test_budget_rank_counts_the_parameters_of_a_lora():
    weight, tall = matrix(20, 30), matrix(50, 4)
    with pytest.warns(UserWarning, match="compact state takes more memory"):
        optimizer = SparseAdamW([weight, tall], selection=Magnitude(), budget_rank=4)
    optimizer.select()
    assert optimizer.selected(weight).sum() == 4 * (20 + 30)
    assert optimizer.selected(tall).sum() == 50 * 4  # min((50+4)·4, 50·4)


def test_a_density_that_selects_nothing_warns():
    with pytest.warns(UserWarning, match=r"params\[0\]: no entries are selected"):
        optimizer = SparseAdamW([matrix(3, 4)], selection=Magnitude(), density=0.05)
    weight = optimizer.param_groups[0]["params"][0]
    before = weight.detach().clone()
    step(optimizer, weight)
    assert (weight == before).all()


def test_report_tells_density_kept_share_and_update_norm():
    weight, bias = matrix(), Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = SparseAdamW(
        [("w", weight), ("b", bias)], lr=0.1, weight_decay=0.0, selection=Random(), density=0.5
    )
    step(optimizer, weight, bias)
    assert [record.kept_share for record in optimizer.report()] == [None, None]
    step(optimizer, weight, bias, seed=1)
    optimizer.select()
    before = weight.detach().clone()
    step(optimizer, weight, bias, seed=2)
    first, second = optimizer.report()
    assert (first.name, first.shape, first.selected, first.density) == ("w", (20, 30), 300, 0.5)
    assert 0.3 < first.kept_share < 0.7
    assert first.update_norm == pytest.approx(float((weight - before).detach().norm()), rel=1e-9)
    assert (second.name, second.density, second.kept_share) == ("b", 1.0, None)
    assert "kept" in str(optimizer.report()) and "50.00%" in str(optimizer.report())
