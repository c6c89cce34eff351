"""What peft's `get_peft_model` takes for partune's methods."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft import PeftConfig, PeftType

from partune.nn import BlockLoRAConfig, ScaleShiftConfig
from partune.nn._registry import AdapterConfig
from partune.nn.block_lora import BLOCKS, RANK
from partune.nn.scale_shift import INIT_STD

# What peft adds to modules_to_save by the task, whether the model has it or not.
HEADS_BY_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass
class AdapterPeftConfig(PeftConfig):
    """A method's options, as peft keeps and saves them."""

    peft_type_name: ClassVar[str]
    of: ClassVar[type[AdapterConfig]]

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Suffixes of the modules, or a regular expression; None: the default."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Suffixes of the modules that are trained whole; None: the head."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.peft_type_name]
        if isinstance(self.target_modules, set | tuple):
            self.target_modules = sorted(self.target_modules)
        if isinstance(self.modules_to_save, set | tuple):
            self.modules_to_save = sorted(self.modules_to_save)
        self.adapter_config()

    def adapter_config(self) -> AdapterConfig:
        """What `partune.nn.attach` takes for the same."""
        options: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self.of)}  # type: ignore[arg-type]
        return self.of(**options)


@dataclass
class ScaleShiftPeftConfig(AdapterPeftConfig):
    """SSF in peft: a scale and a shift after linear layers, convolutions and norms.

    For `get_peft_model`, `PeftModel.from_pretrained` and what peft has beside: `merge_and_unload`,
    `disable_adapter`, several adapters of which one is active, transformers' `Trainer`. Loading a
    saved adapter needs `import partune.integrations.peft` before.

    Args:
        target_modules, shift, modules_to_save, channel_dim, init_std: as for
            `partune.nn.ScaleShiftConfig`.
        task_type, inference_mode, base_model_name_or_path, revision: as for peft's own configs.

    Raises:
        TypeError, ValueError: as `ScaleShiftConfig` does.

    Reference: Scaling & Shifting Your Features (arXiv 2210.08823), section 3.2.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 8)), ScaleShiftPeftConfig())
        >>> model.print_trainable_parameters()
        trainable params: 16 || all params: 56 || trainable%: 28.5714
    """

    peft_type_name: ClassVar[str] = "PARTUNE_SCALE_SHIFT"
    of: ClassVar[type[AdapterConfig]] = ScaleShiftConfig

    shift: bool | None = field(
        default=None, metadata={"help": "None: where a bias can take it at merging."}
    )
    channel_dim: int | None = field(
        default=None, metadata={"help": "-1 or 1, where a layer's class doesn't tell."}
    )
    init_std: float = field(default=INIT_STD, metadata={"help": "Standard deviation of the start."})


@dataclass
class BlockLoRAPeftConfig(AdapterPeftConfig):
    """Block-LoRA in peft: low-rank factors whose blocks share one down-projection.

    As `ScaleShiftPeftConfig`; adapters that add up can be merged together by their names.
    `export_lora` writes one as a LoRA that stock peft loads.

    Args:
        rank, blocks, share, alpha, dropout, target_modules, scaling, rank_pattern, alpha_pattern,
            parts, modules_to_save: as for `partune.nn.BlockLoRAConfig`; target_modules may be
            "all-linear" too, which is the default.
        task_type, inference_mode, base_model_name_or_path, revision: as for peft's own configs.

    Raises:
        TypeError, ValueError: as `BlockLoRAConfig` does.

    Reference: arXiv 2501.16720, as `partune.nn.BlockLoRA` reads it.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> config = BlockLoRAPeftConfig(rank=2, blocks=2)
        >>> get_peft_model(nn.Sequential(nn.Linear(8, 4)), config).print_trainable_parameters()
        trainable params: 16 || all params: 52 || trainable%: 30.7692
    """

    peft_type_name: ClassVar[str] = "PARTUNE_BLOCK_LORA"
    of: ClassVar[type[AdapterConfig]] = BlockLoRAConfig

    rank: int = field(default=RANK, metadata={"help": "Of the update of each layer."})
    blocks: int = field(default=BLOCKS, metadata={"help": "That share the down-projection."})
    share: str = field(default="input", metadata={"help": "What is cut: 'input' or 'rank'."})
    alpha: float | None = field(default=None, metadata={"help": "The scale's numerator."})
    dropout: float = field(default=0.0, metadata={"help": "Of the input features, in training."})
    scaling: str = field(default="standard", metadata={"help": "'standard' or 'rslora'."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "By suffix."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "By suffix."})
    parts: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Of fused layers, by suffix, such as q and v."}
    )
