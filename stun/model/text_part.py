"""The model of a checkpoint on the meta device, and its text part: the decoder whose layers have experts, and its output head.

Vision, audio and omni checkpoints wrap a text model. They are built whole, since names of tensors and the way from tokens to
logits are the wrapper's; only the text part is run and pruned.
"""

from dataclasses import dataclass
from pathlib import Path

import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForTextToWaveform,
    PreTrainedModel,
)
from transformers.configuration_utils import PreTrainedConfig

from stun.config import StunError
from stun.model.empty import without_weights
from stun.model.tensor_names import experts_of

# Wrapped models first: for some, the class for text alone is listed under the wrapper's configuration too.
AUTOS = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM, AutoModelForTextToWaveform)


@dataclass(frozen=True)
class TextPart:
    """`whole` is the checkpoint's model, `model` the part of it that gives logits, `decoder` the part of that with the layers,
    and `path` the decoder's place in `whole`, with a dot behind it."""

    whole: PreTrainedModel
    model: PreTrainedModel
    decoder: PreTrainedModel
    path: str


def build(config: PreTrainedConfig, named: list[str] = ()) -> PreTrainedModel:
    """Model of a configuration without weights, of the class that config.json names if transformers has several. Raises
    ValueError if it has none."""
    with without_weights():
        return class_of(type(config), named)._from_config(config)


def auto_of(config_class: type[PreTrainedConfig]) -> list[type]:
    """transformers' Auto classes that know a configuration's models, the one that is loaded with first."""
    return [auto for auto in AUTOS if config_class in auto._model_mapping]


def class_of(config_class: type[PreTrainedConfig], named: list[str] = ()) -> type[PreTrainedModel]:
    """Model class of a configuration class: of those `named` in config.json if there are several. Raises ValueError if there is
    none."""
    found: list[type[PreTrainedModel]] = []
    for auto in auto_of(config_class):
        own = auto._model_mapping[config_class]
        found += own if isinstance(own, (tuple, list)) else [own]
    for name in named:
        own = getattr(transformers, str(name), None)
        is_model = isinstance(own, type) and issubclass(own, PreTrainedModel)
        found += [own] if is_model and config_class is getattr(own, "config_class", None) else []
    if not found:
        raise ValueError(f"transformers has no model of {config_class.__name__} that gives logits")
    return next((own for own in found if own.__name__ in named), found[0])


def text_part(folder: Path, whole: PreTrainedModel) -> TextPart:
    """The text part of a model: its decoder has most layers with experts. Raises StunError if there is none."""
    decoders = []
    for path, module in whole.named_modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and isinstance(module, PreTrainedModel):
            count = sum(experts_of(layer) is not None for layer in layers)
            decoders += [(count, path, module)] if isinstance(_of(module, "get_input_embeddings"), nn.Module) else []
    if not decoders:
        reason = f"{type(whole).__name__} has no decoder layers that take token embeddings"
        raise StunError(f"{folder}: model_type {whole.config.model_type!r} is not supported: {reason}")
    most = max(count for count, _, _ in decoders)
    path, decoder = next((path, module) for count, path, module in decoders if count == most)
    above = [module for place, module in whole.named_modules() if path.startswith(f"{place}.") or not place or place == path]
    models = [module for module in above if isinstance(module, PreTrainedModel) and module is not decoder]
    model = next((module for module in reversed(models) if _of(module, "get_output_embeddings") is not None), None)
    if model is None:
        raise StunError(f"{folder}: {type(whole).__name__} has no output head that gives logits of tokens")
    return TextPart(whole, model, decoder, f"{path}." if path else "")


def _of(module: PreTrainedModel, getter: str) -> nn.Module | None:
    try:
        return getattr(module, getter)()
    except (AttributeError, NotImplementedError):  # of towers, which have none
        return None
