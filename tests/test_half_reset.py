"""half_reset_: the base streamed back into half of a tuned model, and the way back."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import partune.selection.half.reset as reset_module
from cuda_emulator import same_bits
from half_models import make
from partune.selection import Half, half_reset_

LEVELS = ("category", "layer", "model", "rows", "columns", "elements")


def tuned(family: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model, and its weights before it was tuned."""
    model = make(family)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model, base


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ["GPT2", "Mixtral"])
def test_half_goes_back_and_returns(family: str, level: str, tmp_path) -> None:
    model, base = tuned(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(before, tmp_path / "tuned.safetensors")
    plan = Half(seed=3, level=level)
    reset = half_reset_(model, tmp_path / "base.safetensors", plan=plan)
    assert reset.plan == plan.plan(model)
    went_back = 0
    for name, parameter in model.named_parameters():
        back, stayed = parameter == base[name], parameter == before[name]
        assert (back ^ stayed).all()
        live = reset.plan.live[name]
        if live.kind == "all":
            assert stayed.all()
        elif live.kind == "none":
            assert back.all()
        went_back += int(back.sum())
    assert went_back == reset.entries
    expected = reset.plan.entries - reset.plan.live_entries
    assert went_back == pytest.approx(expected, rel=0.02)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    reset.undo_(model)
    assert all(same_bits(p.detach(), before[n]) for n, p in model.named_parameters())
    half_reset_(model, base, plan=plan)
    assert all(same_bits(p.detach(), after[n]) for n, p in model.named_parameters())
    half_reset_(model, tmp_path / "tuned.safetensors", plan=plan)
    assert all(same_bits(p.detach(), before[n]) for n, p in model.named_parameters())


def test_a_folder_of_shards_is_read_one_tensor_at_a_time(tmp_path, monkeypatch) -> None:
    model, _ = tuned("Llama")
    make("Llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    largest, alive = 0, set()
    read = reset_module._Tensors.read

    def counted(self, name: str) -> torch.Tensor:
        nonlocal largest
        import weakref

        tensor = read(self, name)
        key = object()
        alive.add(key)
        weakref.finalize(tensor, alive.discard, key)
        largest = max(largest, len(alive))
        return tensor

    monkeypatch.setattr(reset_module._Tensors, "read", counted)
    reset = half_reset_(model, tmp_path, seed=1)
    assert reset.plan.half == Half(seed=1)
    assert largest <= 2, "the base was held in memory"
    base = dict(make("Llama").named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base[name]) is (reset.plan.live[name].kind == "none")


def test_the_weights_take_the_models_dtype() -> None:
    model, base = tuned("Llama")
    model.bfloat16()
    reset = half_reset_(model, base, seed=0)
    for name, parameter in model.named_parameters():
        if reset.plan.live[name].kind == "none":
            assert torch.equal(parameter, base[name].bfloat16())


def test_errors_change_nothing(tmp_path) -> None:
    model, base = tuned("Llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = Half(seed=0).plan(model)
    last = [name for name, live in plan.live.items() if live.kind == "none"][-1]
    lacking = {name: value for name, value in base.items() if name != last}
    with pytest.raises(ValueError, match=f"base: got no tensor {last}"):
        half_reset_(model, lacking, seed=0)
    with pytest.raises(ValueError, match=r"got shape \(3,\), want"):
        half_reset_(model, {**base, last: torch.zeros(3)}, seed=0)
    with pytest.raises(FileNotFoundError, match="want a safetensors file or a folder"):
        half_reset_(model, tmp_path, seed=0)
    other = Half(seed=0).plan(make("GPT2"))
    with pytest.raises(ValueError, match="plan: got one of another model, which has"):
        half_reset_(model, base, plan=other)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    reset = half_reset_(model, base, seed=0)
    with pytest.raises(ValueError, match="model: got none of the name"):
        reset.undo_(make("GPT2"))
