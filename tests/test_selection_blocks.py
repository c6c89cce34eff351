"""Selections by blocks: which are chosen, in both routes, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from op_cases import TOLERANCE, assert_close
from partune.nn import SparseConfig, SparseLinear, attach, load_adapter, refresh, save_adapter
from partune.ops.csr import csr_from_mask, mask_from_csr, validate_blocks
from partune.ops.sparse_linear import sparse_grouped_linear
from partune.optim import LiftAdamW, SparseAdamW
from partune.selection import Factors, Magnitude, PrincipalWeights, Random, Scores, topk_csr

BLOCKS = [(1, 1), (4, 4), (1, 8), (3, 1), (8, 16)]
SIZES = (24, 48)


def mask_of(csr, columns):
    return mask_from_csr(*csr, columns)


def tiles(matrix, block):
    """[row of blocks, column of blocks, rows, columns]."""
    rows, columns = matrix.shape
    split = matrix.view(rows // block[0], block[0], columns // block[1], block[1])
    return split.transpose(1, 2)


def wanted_mask(scores, k, block, largest=True):
    """Block by block, in float64."""
    sums = tiles(scores.double(), block).sum((2, 3))
    order = sums.flatten().argsort(descending=largest, stable=True)[: k // (block[0] * block[1])]
    chosen = torch.zeros(sums.numel(), dtype=torch.bool)
    chosen[order] = True
    return chosen.view_as(sums).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_blocks_of_the_largest_sums(block, dtype, largest):
    torch.manual_seed(0)
    scores = torch.randn(SIZES).to(dtype)
    size = block[0] * block[1]
    for k in (0, size, 2 * size, scores.numel()):
        crow, col = topk_csr(Scores(scores, largest), k, block=block)
        assert crow.dtype == torch.int64 and col.dtype == torch.int32
        mask = mask_of((crow, col), SIZES[1])
        assert torch.equal(mask, wanted_mask(scores, k, block, largest))
        again = csr_from_mask(mask)  # ascending and row-major
        assert torch.equal(crow, again[0]) and torch.equal(col, again[1])


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_factors(block, monkeypatch):
    """As their product's magnitudes, also where it is formed in several panels."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-4, 5, (24, 3), generator=generator).double()
    right = torch.randint(-4, 5, (3, 48), generator=generator).double()
    k = 3 * block[0] * block[1]
    wanted = wanted_mask((left @ right).abs(), k, block)
    for entries in (2**22, 100):
        monkeypatch.setattr("partune.selection.topk._PANEL_ENTRIES", entries)
        assert torch.equal(mask_of(topk_csr(Factors(left, right), k, block=block), 48), wanted)


def test_equal_blocks_and_nan():
    """Ties go to the first block; one with a NaN comes last."""
    scores = torch.ones(4, 8)
    scores[1, 1] = float("nan")
    mask = mask_of(topk_csr(Scores(scores), 8, block=(2, 2)), 8)
    assert mask.any(1).tolist() == [True, True, False, False]
    assert mask[0].tolist() == [False] * 2 + [True] * 4 + [False] * 2


def test_validate_blocks():
    mask = wanted_mask(torch.rand(SIZES), 160, (4, 4))
    csr = csr_from_mask(mask)
    for block in ((1, 1), (4, 4), (2, 4), (4, 1), (2, 2)):
        validate_blocks(*csr, block)
    validate_blocks(*csr_from_mask(mask & False), (4, 4))
    broken = []
    for rows, columns in ((1, 0), (0, 1), (1, 1)):  # blocks that begin elsewhere
        moved = torch.zeros_like(mask)
        moved[4 + rows : 8 + rows, 8 + columns : 12 + columns] = True
        broken.append(csr_from_mask(moved))
    row, column = (index[0] for index in mask.nonzero(as_tuple=True))
    free = int((~mask[row]).nonzero()[0])
    moved = mask.clone()
    moved[row, column], moved[row, free] = False, True  # as long a row, of other columns
    broken.append(csr_from_mask(moved))
    crow, col = csr
    other = col.clone()
    other[int(crow[row + 1])] = other[int(crow[row + 1])] + 1  # a run with a gap
    broken.append((crow, other))
    lacking = mask.clone()
    lacking[row] = False
    broken.append(csr_from_mask(lacking))
    for each in broken:
        with pytest.raises(ValueError, match="col_indices: got entries that are no blocks of 4x4"):
            validate_blocks(*each, (4, 4))
    with pytest.raises(ValueError, match="no blocks of 5x4"):
        validate_blocks(*csr, (5, 4))


@pytest.mark.parametrize("selection", [PrincipalWeights(3), Magnitude(), Random(5)])
def test_the_optimizer_route(selection):
    torch.manual_seed(0)
    weight, experts = Parameter(torch.randn(SIZES)), Parameter(torch.randn(2, 16, 8))
    optimizer = SparseAdamW(
        [weight, experts], selection=selection, density=0.15, block=(4, 4), refresh_interval=2
    )
    for _ in range(3):
        (weight.square().sum() + experts.square().sum()).backward()
        optimizer.step()
    mask = tiles(optimizer.selected(weight), (4, 4)).flatten(2).sum(2)
    assert set(mask.flatten().tolist()) == {0, 16}
    assert (mask > 0).sum() == int(0.15 * 24 * 48) // 16
    for expert in optimizer.selected(experts):
        assert tiles(expert, (4, 4)).flatten(2).all(2).sum() == 1 and expert.sum() == 16
    resumed = SparseAdamW(
        [weight, experts], selection=selection, density=0.15, block=(4, 4), refresh_interval=2
    )
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(resumed.selected(weight), optimizer.selected(weight))


def test_lift_by_blocks_is_the_layer_route_by_blocks():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).double()
    model = copy.deepcopy(plain)
    attach(model, SparseConfig(PrincipalWeights(4), density=0.2, block=(4, 4)))
    values = [layer.adapter.values for layer in (model[0], model[2])]
    mine = torch.optim.AdamW(values, lr=1e-3, weight_decay=0.0)
    plain.requires_grad_(False)
    weights = [plain[i].weight.requires_grad_() for i in (0, 2)]
    theirs = LiftAdamW(
        weights, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, eps_mode="corrected", rank=4, density=0.2,
        block=(4, 4), refresh_interval=5,
    )  # fmt: skip
    for step in range(1, 13):
        x = torch.randn(6, 16, dtype=torch.float64)
        for each, optimizer in ((plain, theirs), (model, mine)):
            each(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 5 == 0:
            refresh(model, mine)
    for i in (0, 2):
        entries = model[i].adapter
        assert torch.equal(mask_of(entries.csr, entries.columns), theirs.selected(plain[i].weight))
        torch.testing.assert_close(model[i].weight, plain[i].weight.detach(), rtol=0, atol=1e-12)


def test_files_keep_the_block(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24))
    model = attach(copy.deepcopy(base), SparseConfig(Magnitude(), density=0.2, block=(4, 8)))
    path = tmp_path / "blocks.safetensors"
    save_adapter(model, path)
    loaded = load_adapter(copy.deepcopy(base), path)
    assert loaded[0].adapter.block == (4, 8)
    assert torch.equal(loaded[0].adapter.col_indices, model[0].adapter.col_indices)
    model[0].adapter.col_indices[0] += 1
    if model[0].adapter.col_indices[0] == model[0].adapter.col_indices[1]:
        model[0].adapter.col_indices[:8] = torch.arange(1, 9)
    save_adapter(model, path)
    with pytest.raises(ValueError, match=r"0, col_indices: got entries that are no blocks of 4x8"):
        load_adapter(copy.deepcopy(base), path)


@pytest.mark.parametrize("block", [(4,), (0, 4), (4, 2.0), 4, [4, 4], (True, 1), None])
def test_no_blocks(block):
    message = r"block: got .*, want rows and columns, such as \(4, 4\)"
    with pytest.raises(ValueError, match=message):
        topk_csr(Scores(torch.ones(8, 8)), 16, block=block)
    with pytest.raises(ValueError, match=message):
        SparseAdamW([Parameter(torch.ones(8, 8))], selection=Magnitude(), block=block)
    with pytest.raises(ValueError, match=message):
        SparseConfig(Magnitude(), block=block)


def test_blocks_that_do_not_divide():
    uneven = Parameter(torch.randn(8, 6))
    message = r"block: got \(4, 4\) for a matrix of 8x6, want rows and columns that divide it"
    with pytest.raises(ValueError, match=message):
        topk_csr(Scores(uneven.detach()), 16, block=(4, 4))
    with pytest.raises(ValueError, match=rf"params\[0\]: {message}"):
        SparseAdamW([uneven], selection=Magnitude(), block=(4, 4))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(6, 8))
    with pytest.raises(ValueError, match=rf"1: {message}"):
        attach(model, SparseConfig(Magnitude(), block=(4, 4)))
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match=message):
        SparseLinear(6, 8, selection=Magnitude(), block=(4, 4))
    with pytest.raises(
        ValueError, match="k: got 24, want a multiple of 16, the entries of a block"
    ):
        topk_csr(Scores(torch.ones(8, 8)), 24, block=(4, 4))


class Routes(TorchDispatchMode):
    """Which routes the sampled gradients of a backward take."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.partune.sampled_grad_.default:
            self.taken.append(kwargs["route"])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("block", "route"),
    [((4, 4), "blocks"), ((8, 4), "blocks"), ((2, 4), "sampled"), ((1, 1), "sampled")],
)
def test_layers_take_the_kernel_of_blocks(block, route, dtype):
    """With the sums of the other one, bit for bit."""
    torch.manual_seed(0)
    layers = (nn.Linear(16, 24), Conv1D(8, 24))
    model = nn.Sequential(*layers).to(dtype)
    dense = copy.deepcopy(model)
    attach(model, SparseConfig(Magnitude(), density=0.2, block=block))
    x = torch.randn(5, 16).to(dtype)
    with Routes() as routes:
        model(x).square().sum().backward()
    assert routes.taken == [route] * 2
    dense(x).square().sum().backward()
    for sparse, plain in zip(model, dense, strict=True):
        entries = sparse.adapter
        grad = plain.weight.grad[mask_of(entries.csr, entries.columns)].to(entries.values.dtype)
        assert_close(entries.values.grad, grad, TOLERANCE[dtype])


def test_a_compiled_layer_takes_it_too():
    torch.manual_seed(0)
    layer = SparseLinear(16, 24, selection=Magnitude(), density=0.2, block=(4, 4))
    x = torch.randn(5, 16)
    layer(x).square().sum().backward()
    wanted, layer.adapter.values.grad = layer.adapter.values.grad, None
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert_close(layer.adapter.values.grad, wanted)


def test_experts_take_it_too():
    torch.manual_seed(0)
    weight = torch.randn(2, 16, 8, dtype=torch.float64)
    mask = torch.zeros(2, 16, 8, dtype=torch.bool)
    mask[0, 4:8, 4:], mask[1, :4, :4] = True, True
    csr, x = csr_from_mask(mask.view(32, 8)), torch.randn(5, 8, dtype=torch.float64)
    results = []
    for blocks in (False, True):
        values = weight[mask].requires_grad_()
        with Routes() as routes:
            output = sparse_grouped_linear(x, weight, None, values, *csr, [2, 3], blocks=blocks)
            output.sin().sum().backward()
        assert routes.taken == [("sampled", "blocks")[blocks]] * 2
        results.append(values.grad)
    assert torch.equal(*results)
