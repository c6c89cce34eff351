"""SparseAdamW behaves as torch.optim.AdamW does, and equals it where everything is selected."""

import copy
import pickle

import pytest
import torch
from torch.nn import Parameter

from partune.optim import LiftAdamW, SparseAdamW
from partune.selection import Magnitude, Movement, PrincipalWeights, Random

SHAPES = [(20, 30), (7,), (3, 8, 5), (4, 3, 2, 2), ()]
ignore_full_density = pytest.mark.filterwarnings("ignore:.*compact state")


def parameters(seed=0, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def set_grads(*lists, seed):
    """The same random gradients for every list of parameters."""
    for params in lists:
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def largest_difference(ours, theirs):
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


@ignore_full_density
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.3},
        {"maximize": True, "weight_decay": 0.1},
        {"betas": (0.5, 0.7), "eps": 0.1},
        {"lr": torch.tensor(0.02, dtype=torch.float64)},
    ],
    ids=["default", "decay", "maximize", "betas", "tensor-lr"],
)
def test_everything_selected_is_adamw(options):
    ours, theirs = parameters(), parameters()
    settings = {"lr": 0.01, **options}
    optimizer = SparseAdamW(
        ours, selection=Magnitude(), density=1.0, refresh_interval=3, **settings
    )
    reference = torch.optim.AdamW(theirs, **settings)
    for step in range(10):
        set_grads(ours, theirs, seed=step)
        optimizer.step()
        reference.step()
    assert largest_difference(ours, theirs) <= 1e-13
    assert largest_difference(ours, parameters()) > 0.01


def test_selections_see_the_gradient_that_is_followed():
    values, grad = torch.randn(8, 9), torch.randn(8, 9)
    masks = []
    for sign in (1, -1):
        weight = Parameter(values.clone())
        optimizer = SparseAdamW([weight], selection=Movement(), density=0.2, maximize=sign == -1)
        weight.grad = sign * grad
        optimizer.step()
        masks.append(optimizer.selected(weight))
    assert (masks[0] == masks[1]).all()


def test_defaults_are_those_of_adamw():
    optimizer, reference = (
        SparseAdamW(parameters(), selection=None),
        torch.optim.AdamW(parameters()),
    )
    for name in ("lr", "betas", "eps", "weight_decay", "maximize", "amsgrad"):
        assert optimizer.defaults[name] == reference.defaults[name]


def test_selection_none_is_dense_and_a_group_may_choose():
    ours, theirs = parameters(), parameters()
    groups = [
        {"params": ours[:1], "selection": None},
        {"params": ours[1:2]},
        {"params": ours[2:3], "density": 0.25, "lr": 0.5},
    ]
    optimizer = SparseAdamW(groups, lr=0.01, selection=Magnitude())
    reference = torch.optim.AdamW(theirs[:2], lr=0.01)
    for step in range(3):
        set_grads(ours, theirs, seed=step)
        optimizer.step()
        reference.step()
    assert largest_difference(ours[:2], theirs[:2]) <= 1e-14
    assert optimizer.selected(ours[2]).sum() == 3 * int(0.25 * 40)
    assert optimizer.state[ours[0]]["exp_avg"].shape == ours[0].shape


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    (weight,) = parameters(shapes=[(6, 6)])
    optimizer = SparseAdamW([weight], selection=Magnitude(), density=0.5)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    before = weight.detach().clone()
    loss = optimizer.step(closure)
    assert calls == [True] and loss.item() == (before**2).sum().item()
    assert (weight != before).sum() == 18


@ignore_full_density
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_change_the_rate(tensor_lr):
    ours, theirs = parameters(), parameters()
    runs = []
    for params, make in (
        (ours, lambda p, lr: SparseAdamW(p, lr, selection=Magnitude(), density=1.0)),
        (theirs, torch.optim.AdamW),
    ):
        rate = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
        optimizer = make(params, rate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        runs.append((optimizer, scheduler))
    for step in range(4):
        set_grads(ours, theirs, seed=step)
        for optimizer, scheduler in runs:
            optimizer.step()
            scheduler.step()
    assert largest_difference(ours, theirs) <= 1e-13
    assert float(runs[0][0].param_groups[0]["lr"]) == pytest.approx(0.1 / 16)


def test_hooks_run():
    (weight,) = parameters(shapes=[(4, 4)])
    optimizer = SparseAdamW([weight], selection=Magnitude(), density=0.5)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before step"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(sorted(state)))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("after loading"))
    set_grads([weight], seed=0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [
        "before step", "after step", "before saving", ["param_groups", "state"], "before loading",
        "after loading",
    ]  # fmt: skip


def test_a_load_pre_hook_may_replace_the_checkpoint():
    (weight,) = parameters(shapes=[(4, 4)])
    optimizer = SparseAdamW([weight], selection=Magnitude(), density=0.5)
    renamed = {"wrapped": optimizer.state_dict()}
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state["wrapped"])
    optimizer.load_state_dict(renamed)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_pickled_and_deep_copied_optimizers_go_on_alike(clone):
    ours = parameters()
    optimizer = SparseAdamW(ours, 0.01, selection=Random(3), density=0.2, refresh_interval=2)
    set_grads(ours, seed=0)
    optimizer.step()
    twin = clone(optimizer)
    theirs = [p for group in twin.param_groups for p in group["params"]]
    assert not any(a is b for a, b in zip(ours, theirs, strict=True))
    for step in range(1, 4):
        set_grads(ours, theirs, seed=step)
        optimizer.step()
        twin.step()
    assert largest_difference(ours, theirs) == 0
    assert twin.param_groups[0]["selection"] == Random(3)


def test_add_param_group_selects_at_the_next_step():
    first, second = parameters(shapes=[(10, 10), (10, 10)])
    optimizer = SparseAdamW([first], selection=Magnitude(), density=0.1)
    set_grads([first], seed=0)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "budget_rank": 2, "lr": 0.5})
    set_grads([first, second], seed=1)
    optimizer.step()
    assert optimizer.selected(second).sum() == 40
    assert optimizer.state[second]["step"] == 1 and optimizer.state[first]["step"] == 2
    assert [optimizer.state[p]["parameter_id"] for p in (first, second)] == [0, 1]


def test_named_parameters_keep_their_names():
    model = torch.nn.Linear(8, 4)
    optimizer = SparseAdamW(model.named_parameters(), selection=Magnitude(), density=0.25)
    model(torch.ones(8)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert [record.name for record in optimizer.report()] == ["weight", "bias"]


def test_parameters_without_gradient_are_passed_over():
    first, second = parameters(shapes=[(5, 5), (5, 5)])
    optimizer = SparseAdamW([first, second], selection=Magnitude(), density=0.2)
    set_grads([first], seed=0)
    before = second.detach().clone()
    optimizer.step()
    assert (second == before).all() and second not in optimizer.state


def test_gradients_are_never_changed():
    ours = parameters(dtype=torch.bfloat16)
    optimizer = SparseAdamW(ours, 0.1, selection=Magnitude(), maximize=True, refresh_interval=1)
    set_grads(ours, seed=0)
    before = [(p.grad, p.grad.clone()) for p in ours]
    optimizer.step()
    for p, (grad, values) in zip(ours, before, strict=True):
        assert p.grad is grad and (grad == values).all()


@pytest.mark.parametrize("stride", ["transposed", "sliced"])
def test_matrices_and_gradients_may_have_any_strides(stride):
    values = torch.randn(12, 18, dtype=torch.float64)
    grads = torch.randn(12, 18, dtype=torch.float64)

    def view(contiguous):
        if stride == "transposed":
            return contiguous.T.contiguous().T
        padded = torch.full((12, 20), 7.0, dtype=torch.float64)
        padded[:, 1:19] = contiguous
        return padded[:, 1:19]

    plain, viewed = Parameter(values.clone()), Parameter(view(values))
    plain.grad, viewed.grad = grads, view(grads)
    for p in (plain, viewed):
        SparseAdamW([p], 0.1, selection=PrincipalWeights(4), density=0.3).step()
    assert (plain == viewed).all() and (plain != values).any()


def test_dense_parameters_and_gradients_may_differ_in_strides():
    values, grad = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    last = Parameter(values.to(memory_format=torch.channels_last))
    plain = Parameter(values.clone())
    last.grad, plain.grad = grad, grad.clone()
    SparseAdamW([last], 0.1, selection=None).step()
    torch.optim.AdamW([plain], 0.1).step()
    assert (last - plain).abs().max() <= 1e-6


def test_lift_adamw_is_the_released_recipe():
    (weight,) = parameters(shapes=[(16, 16)])
    optimizer = LiftAdamW([weight], rank=4)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (1e-4, (0.9, 0.95), 1e-6)
    assert (group["weight_decay"], group["density"], group["refresh_interval"]) == (0.0, 0.05, 200)
    assert group["eps_mode"] == "uncorrected" and group["selection"] == PrincipalWeights(4)
    optimizer.add_param_group({"params": parameters(shapes=[(8, 8)]), "rank": 2})
    assert optimizer.param_groups[1]["selection"] == PrincipalWeights(2)


@pytest.mark.parametrize("fused", [None, False])
def test_off_switches_of_adamw_are_accepted(fused):
    SparseAdamW(parameters(), selection=None, fused=fused, foreach=fused, capturable=False)
