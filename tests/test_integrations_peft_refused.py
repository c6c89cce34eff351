"""partune's methods in peft, given what can't be; and a peft whose list of methods has changed."""

import enum
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft
from peft import get_peft_model
from peft.utils import peft_types

from nn_models import transformers_model
from partune.integrations.peft import ScaleShiftPeftConfig
from partune.integrations.peft._methods import TESTED, add_method
from partune.nn import ScaleShiftConfig, attach
from peft_models import model_and_output, plain_state


def config(**options):
    return ScaleShiftPeftConfig(**{"init_std": 0.2, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(init_std=-1.0), ValueError, "init_std: got -1.0, want at least 0"),
        (dict(channel_dim=2), ValueError, "channel_dim: got 2, want None, -1 or 1"),
        (dict(modules_to_save="head"), TypeError, "modules_to_save: got the string 'head'"),
        (dict(task_type="DANCING"), ValueError, "Invalid task type: 'DANCING'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ScaleShiftPeftConfig(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(target_modules=["query"]), ValueError, r"target_modules: \['query'\] matched no"),
        (dict(target_modules=["attn"]), TypeError, "blocks.0.attn is a Attention, want a linear"),
        (dict(modules_to_save=["neck"]), ValueError, "modules_to_save: got 'neck', which is no"),
    ],
)
def test_targets_that_the_model_does_not_have(options, error, message):
    model, run = model_and_output("timm-vit")
    base, plain = run(model), plain_state(model)
    with pytest.raises(error, match=message):
        get_peft_model(model, config(**options))
    assert plain_state(model) == plain and torch.equal(run(model), base)
    tuned = get_peft_model(model, config())
    wanted = run(tuned)
    with pytest.raises(error, match=message):
        tuned.add_adapter("second", config(**options))
    assert torch.equal(run(tuned), wanted) and list(tuned.peft_config) == ["default"]


def test_a_model_that_attach_has_been_at():
    model = attach(transformers_model("llama"), ScaleShiftConfig())
    with pytest.raises(ValueError, match=r"q_proj has an adapter that partune.nn.attach put"):
        get_peft_model(model, config())
    tuned = get_peft_model(transformers_model("llama"), config())
    with pytest.raises(ValueError, match="has an adapter that was attached to another module"):
        attach(tuned, ScaleShiftConfig())


class NamedAlike(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.c_fc(x))


def test_peft_would_train_a_layer_whose_name_ends_like_the_head():
    with pytest.raises(ValueError, match="modules_to_save: peft would take c_fc for fc and train"):
        get_peft_model(NamedAlike(), config())
    get_peft_model(NamedAlike(), config(modules_to_save=[]))


# ---- peft's closed enum ----


def test_the_types_are_members_like_peft_s_own():
    types = peft.PeftType
    kind = types.PARTUNE_SCALE_SHIFT
    assert kind is types["PARTUNE_SCALE_SHIFT"] is types("PARTUNE_SCALE_SHIFT")
    assert kind == kind.value == kind.name == "PARTUNE_SCALE_SHIFT" and kind in list(types)
    assert isinstance(kind, types) and pickle.loads(pickle.dumps(kind)) is kind
    assert repr(kind) == repr(types.LORA).replace("LORA", "PARTUNE_SCALE_SHIFT")
    assert ScaleShiftPeftConfig().peft_type is kind
    assert peft.__version__ in TESTED


class Foreign:
    prefix = "foreign"


def test_an_enum_that_is_none(monkeypatch):
    monkeypatch.setattr(peft_types, "PeftType", {"LORA": "LORA"})
    with pytest.raises(ImportError, match=rf"peft {peft.__version__} is not as partune .*0\.21\.2"):
        add_method("FOREIGN", Foreign, Foreign, "foreign")


def test_an_enum_that_takes_no_new_member(monkeypatch):
    class Sealed(enum.EnumMeta):
        def __setattr__(cls, name, value):
            raise TypeError("sealed")

    class Types(str, enum.Enum, metaclass=enum.EnumMeta):
        LORA = "LORA"

    monkeypatch.setattr(peft_types, "PeftType", Types)
    with pytest.raises(ImportError, match="can't be extended by LORA: it has that member already"):
        add_method("LORA", Foreign, Foreign, "foreign")
    Types.__class__ = Sealed
    with pytest.raises(ImportError, match="can't be extended by FOREIGN: sealed; tested with"):
        add_method("FOREIGN", Foreign, Foreign, "foreign")
    assert list(Types.__members__) == ["LORA"]


def test_a_hook_that_is_gone(monkeypatch):
    monkeypatch.delattr(peft.tuners.tuners_utils.BaseTuner, "_replace_module")
    with pytest.raises(ImportError, match=r"its tuners_utils.BaseTuner has no _replace_module; te"):
        add_method("FOREIGN", Foreign, Foreign, "foreign")
    monkeypatch.delattr(peft.tuners.tuners_utils, "BaseTunerLayer")
    monkeypatch.setattr(peft.tuners.tuners_utils.BaseTuner, "_replace_module", None, raising=False)
    with pytest.raises(ImportError, match=r"its tuners_utils.BaseTunerLayer has no merge; tested"):
        add_method("FOREIGN", Foreign, Foreign, "foreign")
    assert "FOREIGN" not in peft.PeftType.__members__


def test_a_registration_that_peft_refuses(monkeypatch):
    def refuse(**options):
        raise KeyError("not today")

    monkeypatch.setattr(peft_types, "register_peft_method", refuse)
    with pytest.raises(ImportError, match="register_peft_method refused FOREIGN: 'not today'"):
        add_method("FOREIGN", Foreign, Foreign, "foreign")
    assert "FOREIGN" not in peft.PeftType.__members__ and not hasattr(peft.PeftType, "FOREIGN")
    monkeypatch.undo()
    with pytest.raises(ImportError, match=r"refused FOREIGN: Inconsistent prefixes found: 'lora_'"):
        add_method("FOREIGN", Foreign, Foreign, "lora_")
    assert "FOREIGN" not in peft.PeftType.__members__
