"""Bad input to the optimizers: a clear error, weights and state unchanged."""

import pytest
import torch
from torch.nn import Parameter

from partune.optim import LiftAdamW, SparseAdamW
from partune.selection import GradientMagnitude, Magnitude, Scores, Selection


def matrix(*shape, dtype=torch.float32):
    return Parameter(torch.randn(shape or (6, 8)).to(dtype))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0.0}, ValueError, "density: got 0.0, want 0 < density <= 1"),
        ({"density": 1.5}, ValueError, "density: got 1.5, want 0 < density <= 1"),
        ({"density": -0.1}, ValueError, "density: got -0.1"),
        ({"density": float("nan")}, ValueError, "density: got nan"),
        ({"density": None}, ValueError, "density: got None"),
        ({"density": 0.1, "budget_rank": 8}, ValueError, r"got both \(0.1 and 8\), want one"),
        ({"density": 0.05, "budget_rank": 8}, ValueError, r"got both \(0.05 and 8\), want one"),
        ({"budget_rank": 0}, ValueError, "budget_rank: got 0, want an int of at least 1"),
        ({"budget_rank": 2.5}, ValueError, "budget_rank: got 2.5"),
        ({"lr": -1.0}, ValueError, "lr: got -1.0, want at least 0"),
        ({"lr": torch.ones(2)}, ValueError, r"lr: got a tensor of shape \(2,\)"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas: got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, ValueError, "betas: got"),
        ({"eps": -1e-8}, ValueError, "eps: got -1e-08"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: got -0.1"),
        ({"refresh_interval": -1}, ValueError, "refresh_interval: got -1"),
        ({"refresh_interval": 2.5}, ValueError, "refresh_interval: got 2.5"),
        ({"eps_mode": "none"}, ValueError, "eps_mode: got 'none', want 'corrected' or"),
        ({"state_dtype": torch.float16}, TypeError, "state_dtype: got torch.float16"),
        ({"state_dtype": torch.float64}, TypeError, "state_dtype: got torch.float64 for params"),
        ({"seed": "one"}, ValueError, "seed: got 'one'"),
        ({"amsgrad": True}, ValueError, "amsgrad: got True, which partune doesn't support"),
        ({"foreach": True}, ValueError, "foreach: got True"),
        ({"capturable": True}, ValueError, "capturable: got True"),
        ({"differentiable": True}, ValueError, "differentiable: got True"),
        ({"fused": True}, ValueError, "fused: got True"),
        ({"selection": "principal"}, TypeError, "selection: got 'principal', want None or"),
        ({"selection": Magnitude}, TypeError, "selection: got <class"),
    ],
    ids=str,
)
def test_options_are_refused_by_the_optimizer_and_by_its_groups(options, error, message):
    with pytest.raises(error, match=message):
        SparseAdamW([matrix()], **{"selection": Magnitude(), **options})
    if options != {"density": None}:  # in a group that means the optimizer's own
        optimizer = SparseAdamW([matrix()], selection=Magnitude())
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": [matrix()], **options})
        assert len(optimizer.param_groups) == 1


def test_lift_checks_its_rank():
    with pytest.raises(ValueError, match="rank: got 0, want at least 1"):
        LiftAdamW([matrix()], rank=0)
    with pytest.raises(TypeError, match="selection: LiftAdamW selects principal weights"):
        LiftAdamW([matrix()], selection=Magnitude())


@pytest.mark.parametrize(
    ("parameter", "error", "message"),
    [
        (matrix(dtype=torch.complex64), TypeError, r"params\[0\]: got torch.complex64"),
        (Parameter(torch.randn(2, 3, 4).transpose(0, 1)), ValueError, r"params\[0\]: got strides"),
        (Parameter(torch.randn(8)[::2]), ValueError, r"params\[0\]: got strides \(2,\)"),
        (
            Parameter(torch.zeros(3, 4).to_sparse(), requires_grad=False),
            TypeError,
            "want a strided parameter",
        ),
    ],
    ids=["complex", "strided-stack", "strided-vector", "sparse"],
)
def test_parameters_that_cannot_be_stepped(parameter, error, message):
    with pytest.raises(error, match=message):
        SparseAdamW([parameter], selection=Magnitude())
    with pytest.raises(error, match="w: got"):
        SparseAdamW([("w", parameter)], selection=Magnitude())


def test_an_explicit_selection_on_a_vector():
    groups = [{"params": [("w", matrix()), ("b", matrix(5))], "selection": Magnitude()}]
    with pytest.raises(ValueError, match=r"b: got shape \(5,\) in a group with a selection"):
        SparseAdamW(groups, selection=None)
    SparseAdamW([matrix(), matrix(5)], selection=Magnitude())  # a plain list steps it whole


def run_refused(optimizer, error, message):
    """A step that is refused and changes nothing; the error names what it refuses."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before, state = [p.detach().clone() for p in params], str(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert str(optimizer.state_dict()) == state


@pytest.mark.parametrize("steps_before", [0, 1])
def test_sparse_gradients(steps_before):
    table = torch.nn.Embedding(10, 4, sparse=True)
    weight = matrix()
    optimizer = SparseAdamW([("w", weight), ("table", table.weight)], selection=Magnitude())
    for _ in range(steps_before):
        weight.grad = torch.randn_like(weight)
        table.weight.grad = torch.randn_like(table.weight)
        optimizer.step()
    weight.grad, table.weight.grad = torch.randn_like(weight), None
    table(torch.tensor([1, 2])).sum().backward()
    run_refused(optimizer, RuntimeError, "table: got a gradient of layout torch.sparse_coo")


def test_a_selection_that_proposes_another_shape():
    class Transposed(Selection):
        def propose(self, weight, grad, state):
            return Scores(weight.T.abs())

    weight = matrix()
    optimizer = SparseAdamW([weight], selection=Transposed())
    weight.grad = torch.randn_like(weight)
    message = r"Transposed proposed scores of shape \(8, 6\) for a matrix of \(6, 8\)"
    run_refused(optimizer, ValueError, message)


def test_selecting_by_gradients_without_gradients():
    optimizer = SparseAdamW([matrix()], selection=GradientMagnitude())
    with pytest.raises(ValueError, match="selects by gradients and got none"):
        optimizer.select()
    assert not optimizer.state


def test_a_foreign_parameter_has_no_selection():
    with pytest.raises(KeyError, match="does not have"):
        SparseAdamW([matrix()], selection=Magnitude()).selected(matrix())


def test_groups_that_are_no_groups():
    optimizer = SparseAdamW([matrix()], selection=Magnitude())
    with pytest.raises(TypeError, match="param_group: got list, want a dict"):
        optimizer.add_param_group([matrix()])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": optimizer.param_groups[0]["params"]})
    assert len(optimizer.param_groups) == 1
