"""Block-LoRA as an ordinary LoRA checkpoint, and LoRA checkpoints as Block-LoRA with one block."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from partune.integrations.peft._configs import BlockLoRAPeftConfig
from partune.integrations.peft._tuner import TunerLayer, refuse_more_than
from partune.nn import BlockLoRAConfig
from partune.nn._block_lora_layers import BlockLoRAConv1D
from partune.nn._checkpoint import fill
from partune.nn._layers import AdaptedLayer, TrainedCopy, base_modules
from partune.nn._registry import Placement, add_adapter, attached, fingerprint, planned
from partune.nn._targets import ends_in
from partune.nn.block_lora import LowRank

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of a checkpoint's keys
_FACTOR = re.compile(r"(.+)\.lora_(A|B)\.weight")

# Of a LoraConfig: what is read, or changes nothing about a trained adapter's outputs.
_TAKEN = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern",
    "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "fan_in_fan_out", "bias", "init_lora_weights", "eva_config",
    "loftq_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size",
    "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# The values that some may have; the first is the default. Other starts have changed the base.
_VALUES: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def export_lora(
    model: nn.Module, folder: str | os.PathLike[str], *, name: str | None = None
) -> None:
    """Write a Block-LoRA adapter as a LoRA checkpoint, which stock peft loads and computes alike.

    The shared down-projection is written out: n copies of it side by side with share="input" (so
    the file has rank·(in + out) numbers for each layer), the arms' sum with share="rank". The scale
    is multiplied into lora_B and lora_alpha is the rank. Parts of a fused layer become one factor
    of their ranks together. A head that was trained goes into modules_to_save.

    Args:
        model: with the adapter, by `partune.nn.attach` or in a `PeftModel`.
        folder: for adapter_config.json and adapter_model.safetensors; made if need be.
        name: of the adapter; None: the active one.

    Raises:
        ValueError: no such adapter; an adapter that isn't Block-LoRA; a model that is itself the
            layer, which peft can't name.

    Example:
        >>> import tempfile
        >>> from partune.nn import attach
        >>> model = attach(nn.Sequential(nn.Linear(8, 4)), BlockLoRAConfig(rank=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_lora(model, folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    adapter = _adapter_of(model, name)
    if "" in adapter.factors:
        raise ValueError(
            "model: it is itself the layer, which peft can't name; put it into another"
        )
    refuse_more_than(list(adapter.heads), adapter.names)
    tensors, ranks = {}, {}
    for layer, factors in adapter.factors.items():
        down, up = lora_factors(factors)
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = down, up
        ranks[layer] = len(down)
    for head, state in adapter.heads.items():
        tensors |= {f"{head}.{key}": value for key, value in state.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(layer)}": r for layer, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=next(iter(adapter.factors.values())).dropout,
        target_modules=_targets(adapter.names, list(ranks)),
        fan_in_fan_out=BlockLoRAConv1D in adapter.kinds,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        modules_to_save=list(adapter.heads) or None,
        base_model_name_or_path=adapter.base,
        task_type=adapter.task,
        inference_mode=True,
    )
    _write(Path(folder), config, tensors)


@torch.no_grad()
def lora_factors(adapter: LowRank) -> tuple[Tensor, Tensor]:
    """LoRA's A [rank, in] and B [out, rank] of the same update, the scale in B."""
    down, up = (factor.detach() for factor in adapter.factors())
    if adapter.share == "input":
        down = down.repeat(1, adapter.in_features // down.shape[1])
    else:
        up = up.sum(0)
    return down.contiguous(), (adapter.scale * up).contiguous()


def load_lora(
    model: nn.Module, folder: str | os.PathLike[str], *, name: str = "default"
) -> nn.Module:
    """Attach a LoRA checkpoint of peft's as Block-LoRA with one block, and activate it.

    Args:
        model: the base that it was trained on; peft doesn't note which, so nothing checks it.
        folder: with adapter_config.json and adapter_model.safetensors.
        name: to attach it under.

    Returns:
        The same model, as `partune.nn.attach` gives it back.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method than LoRA, or what our layer doesn't compute (DoRA, trained
            biases, embeddings, a start that changed the base); layers that the model doesn't have,
            or of other shapes; a name that is taken. Then the model is as it was.
        TypeError: factors for what is no linear layer; the model is as it was.

    Example:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> base, lora = nn.Sequential(nn.Linear(8, 4)), LoraConfig(target_modules=["0"])
        >>> tuned = get_peft_model(nn.Sequential(nn.Linear(8, 4)), lora)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tuned.save_pretrained(folder)
        ...     type(load_lora(base, folder)[0]).__name__
        'BlockLoRALinear'
    """
    folder = Path(folder)
    options = _read_options(folder / _CONFIG)
    tensors = _read_tensors(folder / _WEIGHTS)
    factors = {key: value for key, value in tensors.items() if _FACTOR.fullmatch(key)}
    heads = _heads(options.get("modules_to_save") or (), tensors.keys() - factors, folder)
    ranks = {
        match[1]: len(value)
        for key, value in factors.items()
        if (match := _FACTOR.fullmatch(key)) is not None and match[2] == "A"
    }
    config = _config(model, options, ranks, heads, folder)
    plan = planned(model, config, name)
    fill(plan, _as_planned(plan, tensors), folder)
    add_adapter(model, config, name, plan, fingerprint(model))
    return model


@dataclass(frozen=True)
class _Adapter:
    """A Block-LoRA adapter, out of either kind of model."""

    names: list[str]  # of the base's modules
    factors: dict[str, Any]  # LowRank, by the layer's name
    kinds: set[type[AdaptedLayer]]
    heads: dict[str, dict[str, Tensor]]
    base: str | None
    task: str | None


def _adapter_of(model: nn.Module, name: str | None) -> _Adapter:
    return _of_peft(model, name) if isinstance(model, PeftModel) else _of_attached(model, name)


def _of_attached(model: nn.Module, name: str | None) -> _Adapter:
    name, adapter = attached(model, name)
    if not isinstance(adapter.config, BlockLoRAConfig):
        raise ValueError(
            f"name: {name!r} is {adapter.config.method}, want block_lora, which alone is a LoRA; "
            "merge the adapter and save the model instead"
        )
    kept = {
        layer_name: getattr(model.get_submodule(layer_name), layer.children_name)[name]
        for layer_name, layer in adapter.holders.items()
    }
    heads = [head for head, layer in adapter.holders.items() if layer is TrainedCopy]
    return _Adapter(
        names=[module_name for module_name, _ in base_modules(model)],
        factors={layer: factors for layer, factors in kept.items() if layer not in heads},
        kinds=set(adapter.holders.values()),
        heads={head: kept[head].state_dict() for head in heads},
        base=getattr(model, "name_or_path", None) or None,
        task=None,
    )


def _of_peft(model: Any, name: str | None) -> _Adapter:
    name = model.active_adapters[0] if name is None else name
    config = model.peft_config.get(name)
    if not isinstance(config, BlockLoRAPeftConfig):
        ours = [n for n, c in model.peft_config.items() if isinstance(c, BlockLoRAPeftConfig)]
        raise ValueError(f"name: got {name!r}, want one that is Block-LoRA, of {ours}")
    base: nn.Module = model.get_base_model()
    modules = list(base.named_modules())
    layers = {n: m for n, m in modules if isinstance(m, TunerLayer) and name in m.adapters}
    heads = {n: m for n, m in modules if isinstance(m, ModulesToSaveWrapper)}
    with model.base_model.plain(base):
        names = [module_name for module_name, _ in base.named_modules()]
    return _Adapter(
        names=names,
        factors={n: layer.adapters[name] for n, layer in layers.items()},
        kinds={layer.layers[name] for layer in layers.values()},
        heads={
            n: head.modules_to_save[name].state_dict()
            for n, head in heads.items()
            if name in head.modules_to_save
        },
        base=config.base_model_name_or_path,
        task=config.task_type,
    )


def _targets(names: Sequence[str], chosen: Sequence[str]) -> list[str] | str:
    """What names the chosen modules and no others: last parts, whole names, or an expression."""
    for targets in (sorted({name.rpartition(".")[2] for name in chosen}), sorted(chosen)):
        if {n for n in names if any(ends_in(n, target) for target in targets)} == set(chosen):
            return targets
    return "|".join(re.escape(name) for name in sorted(chosen))


def _write(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Both files, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        config.save_pretrained(staging)
        kept = {_PREFIX + key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        safetensors.torch.save_file(kept, Path(staging, _WEIGHTS), {"format": "pt"})
        for file in (_WEIGHTS, _CONFIG):
            Path(staging, file).replace(folder / file)


def _as_planned(plan: Mapping[str, Placement], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors by the names and in the dtypes of the plan's."""
    dtypes = {
        f"{layer}.{key}": value.dtype
        for layer, placed in plan.items()
        if placed.adapter is not None
        for key, value in placed.adapter.state_dict().items()
    }
    named = {}
    for key, value in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is not None:
            key = f"{match[1]}.{'down' if match[2] == 'A' else 'up'}"
        named[key] = value.to(dtypes.get(key, value.dtype))
    return named


def _read_options(path: Path) -> dict[str, Any]:
    """adapter_config.json, of a LoRA that our layer computes."""
    if not path.is_file():
        raise FileNotFoundError(f"folder: {path} is no file")
    try:
        options = json.loads(path.read_text())
        method = options["peft_type"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"folder: {path} is no config of peft's ({error!r})") from None
    if method != "LORA":
        raise ValueError(f"folder: {path} is of {method}, want LORA")
    odd = {key: value for key, value in options.items() if key not in _TAKEN and value}
    odd |= {
        key: options[key]
        for key, taken in _VALUES.items()
        if options.get(key, taken[0]) not in taken
    }
    if odd:
        key, value = next(iter(odd.items()))
        raise ValueError(
            f"folder: {path} has {key}={value!r}, which a plain low-rank product doesn't compute; "
            "load it with peft"
        )
    return options  # type: ignore[no-any-return]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"folder: {path} is no file; save the adapter with safe_serialization=True"
        )
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"folder: {path} is no whole safetensors file ({error})") from None
    return {key.removeprefix(_PREFIX): value for key, value in tensors.items()}


def _heads(targets: Sequence[str], keys: Iterable[str], folder: Path) -> list[str]:
    """The modules that were trained whole, as the tensors beside the factors name them."""
    heads = []
    for key in keys:
        owners = [key[: dot.start()] for dot in re.finditer(r"\.", key)]
        hits = [name for name in owners if any(name.endswith(target) for target in targets)]
        if not hits:
            raise ValueError(
                f"folder: {folder} has {key}, which belongs to no low-rank product of a linear "
                "layer; load it with peft"
            )
        heads.append(hits[0])
    return sorted(set(heads))


def _config(
    model: nn.Module,
    options: Mapping[str, Any],
    ranks: Mapping[str, int],
    heads: Sequence[str],
    folder: Path,
) -> BlockLoRAConfig:
    names = [name for name, _ in base_modules(model)]
    if not ranks:
        raise ValueError(f"folder: {folder} has no lora_A")
    strange = [name for name in (*ranks, *heads) if name not in names]
    if strange:
        raise ValueError(
            f"folder: {folder} is for {strange[0]}, which the {type(model).__name__} doesn't have; "
            "load it into the base that it was trained on"
        )
    alphas = {}
    for layer, rank in ranks.items():
        said = _by_pattern(options.get("rank_pattern"), layer, options.get("r"))
        if said != rank:
            raise ValueError(
                f"folder: {folder} has rank {rank} for {layer}, its config says {said}"
            )
        alphas[layer] = _by_pattern(options.get("alpha_pattern"), layer, options.get("lora_alpha"))
    return BlockLoRAConfig(
        rank=options["r"],
        blocks=1,
        alpha=options["lora_alpha"],
        dropout=options.get("lora_dropout", 0.0),
        target_modules=_targets(names, list(ranks)),
        scaling="rslora" if options.get("use_rslora") else "standard",
        rank_pattern=ranks if options.get("rank_pattern") else {},
        alpha_pattern=alphas if options.get("alpha_pattern") else {},
        modules_to_save=heads,
    )


def _by_pattern(pattern: Mapping[str, Any] | None, layer: str, otherwise: Any) -> Any:
    """What peft reads out of a rank_pattern or an alpha_pattern: the first that matches."""
    for expression, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({expression})$", layer):
            return value
    return otherwise
