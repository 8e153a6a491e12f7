"""Registration with transformers' `AutoConfig` of what transformers lacks: Arctic, and every family's heterogeneous form.

Imported while transformers itself is (`stun/__init__.py`), hence placeholders for the classes, whose modules follow at first use.
"""

from collections.abc import Callable
from functools import partial

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from stun.model.families import FAMILIES, HETEROGENEOUS


def register() -> None:
    """Register a placeholder for each model type."""
    AutoConfig.register("arctic", _placeholder("arctic", _arctic))
    for name in FAMILIES.keys() - {"arctic"}:  # which has a list in its own field
        model_type = HETEROGENEOUS + name
        AutoConfig.register(model_type, _placeholder(model_type, partial(_heterogeneous, name)))


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


def _arctic() -> type[PreTrainedConfig]:
    from stun.model.arctic import ArcticConfig

    return ArcticConfig


def _heterogeneous(family: str) -> type[PreTrainedConfig]:
    from stun.model.heterogeneous import classes

    return classes(family, FAMILIES[family].count)[0]
