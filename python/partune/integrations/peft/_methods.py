"""peft's list of methods is a closed enum: the one place where it is extended."""

from __future__ import annotations

import enum
from typing import Any

import peft
from peft.tuners import tuners_utils
from peft.utils import peft_types

TESTED = ("0.21.0", "0.21.1", "0.21.2")
_HOOKS = {  # that are overridden, and so have to be there to be called
    "BaseTuner": (
        "_prepare_adapter_config", "_prepare_model", "_check_target_module_exists",
        "_create_and_replace", "_replace_module", "_unload_and_optionally_merge", "merge_adapter",
        "set_adapter",
    ),
    "BaseTunerLayer": (
        "merge", "unmerge", "set_adapter", "enable_adapters", "delete_adapter",
        "_move_adapter_to_device_of_base_layer",
    ),
}  # fmt: skip


def add_method(name: str, config: type[Any], model: type[Any], prefix: str) -> Any:
    """Make a method known to peft: a member of its enum of types, and where its mappings lead.

    Args:
        name: of the enum's member, in capitals; it is what adapter_config.json names.
        config, model: peft's `PeftConfig` and `BaseTuner` of the method.
        prefix: of what the method's layers are called in a state_dict.

    Returns:
        The member.

    Raises:
        ImportError: this peft isn't as it was in the versions that were tested. Then its enum is as
            it was.
    """
    for owner, hooks in _HOOKS.items():
        for hook in hooks:
            if not hasattr(getattr(tuners_utils, owner, None), hook):
                raise ImportError(_message(f"its tuners_utils.{owner} has no {hook}"))
    types = peft_types.PeftType
    try:
        member = _add_member(types, name)
    except (AttributeError, TypeError, ValueError) as error:
        raise ImportError(
            _message(f"its enum PeftType can't be extended by {name}: {error}")
        ) from error
    try:
        peft_types.register_peft_method(
            name=name.lower(), config_cls=config, model_cls=model, prefix=prefix
        )
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        _remove_member(types, name)
        raise ImportError(_message(f"register_peft_method refused {name}: {error}")) from error
    return member


def _message(reason: str) -> str:
    return (
        f"peft {peft.__version__} is not as partune expects it: {reason}; tested with peft "
        f"{', '.join(TESTED)}: install one of these, or use partune.nn.attach, which needs no peft"
    )


def _add_member(types: Any, name: str) -> Any:
    """What the class statement does for each member of an enum of strings."""
    if not isinstance(types, enum.EnumMeta) or str not in types.__mro__:
        raise TypeError(f"want an enum of strings, got {types!r}")
    if name in types.__members__:
        raise ValueError("it has that member already")
    member: Any = str.__new__(types, name)  # type: ignore[arg-type]
    member._name_, member._value_ = name, name
    member.__objclass__, member._sort_order_ = types, len(types)
    setattr(types, name, member)
    types._member_names_.append(name)
    types._member_map_[name] = member
    types._value2member_map_[name] = member
    if types(name) is not member or types[name] is not member or member not in list(types):
        _remove_member(types, name)
        raise ValueError("the new member isn't found")
    return member


def _remove_member(types: Any, name: str) -> None:
    types._member_names_.remove(name)
    del types._value2member_map_[name]
    del types._member_map_[name]
    delattr(types, name)
