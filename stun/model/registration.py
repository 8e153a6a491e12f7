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
    AutoConfig.register("arctic", _placeholder("arctic", _arctic))
    for name, family in ALIASES.items():
        AutoConfig.register(name, _alias(name, family))
    for name in CONFIG_MAPPING_NAMES:  # without Arctic, which has a list in its own field
        model_type = HETEROGENEOUS + name
        AutoConfig.register(model_type, _placeholder(model_type, partial(_heterogeneous, name)))
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


def _placeholder(name: str, real: Callable[[], type[PreTrainedConfig]]) -> type[PreTrainedConfig]:
    """Configuration class of a model type, whose instances are of the class that `real()` makes or imports at first use."""

    class Lazy(PreTrainedConfig):
        model_type = name

        def __new__(cls, *arguments, **keywords):
            return real()(*arguments, **keywords)

        @classmethod
        def from_dict(cls, config_dict, **keywords):
            return real().from_dict(config_dict, **keywords)

    return Lazy


def _alias(name: str, family: str) -> type[PreTrainedConfig]:
    """Configuration class of a model type that is another name of a family's."""

    class Alias(_placeholder(name, partial(CONFIG_MAPPING.__getitem__, family))):
        @classmethod
        def from_dict(cls, config_dict, **keywords):
            return super().from_dict({**config_dict, "model_type": family}, **keywords)

    return Alias


def _arctic() -> type[PreTrainedConfig]:
    from stun.model.arctic import ArcticConfig

    return ArcticConfig


def _heterogeneous(family: str) -> type[PreTrainedConfig]:
    from stun.model.heterogeneous import classes

    return classes(family)[0]
