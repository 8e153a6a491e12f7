"""Registration with transformers' `AutoConfig` of what transformers lacks: Arctic, and every family's heterogeneous form and that
with novices.

Imported while transformers itself is (`stun/__init__.py`), hence placeholders for the classes, whose modules follow at first use.
"""

import importlib
from collections.abc import Callable
from functools import partial, wraps

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from stun.model.families import ALIASES, HETEROGENEOUS, NOVICES


def register() -> None:
    """Register a placeholder for each model type."""
    real = {name: partial(CONFIG_MAPPING.__getitem__, family) for name, family in ALIASES.items()}
    # Without Arctic, which has a list in its own field.
    real |= {HETEROGENEOUS + family: partial(_heterogeneous, family) for family in CONFIG_MAPPING_NAMES}
    for name, config_class in {"arctic": _arctic, **real}.items():
        AutoConfig.register(name, _placeholder(name, config_class))
    PreTrainedConfig.from_dict = _with_novices(PreTrainedConfig.from_dict.__func__)


def _with_novices(original: Callable) -> classmethod:
    """transformers' `from_dict`, but that a configuration that lists novices is of the class that knows them; its model type is
    the family's own."""

    @wraps(original)
    def from_dict(cls, config_dict, **keywords):
        is_own = "model_type" in cls.__dict__  # what is derived from it inherits the type
        if config_dict.get(NOVICES) and is_own:
            cls = importlib.import_module("stun.model.novices").config_class(cls)
        return original(cls, config_dict, **keywords)

    return classmethod(from_dict)


class _Placeholder(PreTrainedConfig):
    """Configuration class of a model type, whose instances are of the class that `real()` makes or imports at first use."""

    real: Callable[[], type[PreTrainedConfig]]

    def __init_subclass__(cls) -> None:
        """Nothing of transformers', which would write methods for each of hundreds: half a second for instances that none has."""

    def __new__(cls, *arguments, **keywords):
        return cls.real()(*arguments, **keywords)

    @classmethod
    def from_dict(cls, config_dict, **keywords):
        own = cls.real()  # whose model type an alias takes
        return own.from_dict({**config_dict, "model_type": own.model_type}, **keywords)


def _placeholder(name: str, real: Callable[[], type[PreTrainedConfig]]) -> type[PreTrainedConfig]:
    return type("Lazy", (_Placeholder,), {"model_type": name, "real": staticmethod(real)})


def _arctic() -> type[PreTrainedConfig]:
    return importlib.import_module("stun.model.arctic").ArcticConfig


def _heterogeneous(family: str) -> type[PreTrainedConfig]:
    return importlib.import_module("stun.model.heterogeneous").classes(family)[0]
