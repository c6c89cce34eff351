"""partune's adapters as methods of peft, and LoRA checkpoints from and to peft.

Importing this adds the methods to peft's list, which `PeftModel.from_pretrained` reads too.
"""

from partune.integrations.peft._configs import BlockLoRAPeftConfig, ScaleShiftPeftConfig
from partune.integrations.peft._lora import export_lora, load_lora
from partune.integrations.peft._methods import add_method
from partune.integrations.peft._tuner import BlockLoRAModel, ScaleShiftModel

__all__ = ["BlockLoRAPeftConfig", "ScaleShiftPeftConfig", "export_lora", "load_lora"]

for _config, _model in (
    (ScaleShiftPeftConfig, ScaleShiftModel),
    (BlockLoRAPeftConfig, BlockLoRAModel),
):
    add_method(_config.peft_type_name, _config, _model, _model.prefix)
