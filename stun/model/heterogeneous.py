"""Checkpoints whose layers keep different numbers of experts, for every family of transformers.

transformers builds all layers of a model from one expert count. Such a checkpoint therefore has the model type
`stun_<family>`, which stock runtimes refuse by name, and `experts_per_layer` in its config.json (0: a layer without experts).
After `import stun`, `AutoModelForCausalLM` loads, runs and saves it, with classes derived from the family's at first use; other
programs run the code beside it (stun.model.remote_code). Arctic reads a list in `num_local_experts` instead, as in the models
that the STUN authors saved.
"""

import copy
import functools
from pathlib import Path

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stun.model import remote_code
from stun.model.families import ALIASES, HETEROGENEOUS, HETEROGENEOUS_CLASS, count_field
from stun.model.text_part import auto_of, class_of, text_part

_PER_LAYER = "experts_per_layer"


def describe(config: dict, text: dict, name: str, counts: list[int]) -> None:
    """Write `counts` experts per layer into the content of a config.json, `text` being the part of it that describes the text
    model; `name` is the family's field for the count."""
    if config["model_type"] == "arctic":
        text[name] = counts
        return
    family = config["model_type"].removeprefix(HETEROGENEOUS)
    family = ALIASES.get(family, family)
    text.update({name: max(counts), _PER_LAYER: counts})
    config["model_type"] = HETEROGENEOUS + family
    config["architectures"] = [_class_name(a) for a in config.get("architectures") or []]
    config["auto_map"] = remote_code.auto_map(family)


def forget(config: dict, text: dict, name: str, count: int) -> None:
    """Write one count for all layers, in the family's standard form."""
    if text.pop(_PER_LAYER, None) is not None:
        config["model_type"] = config["model_type"].removeprefix(HETEROGENEOUS)
        config["architectures"] = [a.removeprefix(HETEROGENEOUS_CLASS) for a in config.get("architectures") or []]
        config.pop("auto_map", None)
    text[name] = count


def _class_name(name: str) -> str:
    return HETEROGENEOUS_CLASS + name.removeprefix(HETEROGENEOUS_CLASS)


@functools.cache
def classes(family: str) -> tuple[type, type]:
    """Configuration and model class of a family's heterogeneous checkpoints, registered with the Auto classes."""
    base_config = CONFIG_MAPPING[family]
    base_model = class_of(base_config)
    model_type = HETEROGENEOUS + family

    class Model(base_model):
        def __init__(self, config, *arguments, **keywords):
            super().__init__(config, *arguments, **keywords)
            decoder = text_part(Path(config.name_or_path), self).decoder
            name = count_field(decoder.config)
            for index, layer in enumerate(decoder.layers):
                count = decoder.config.experts_per_layer[index]
                if count:
                    decoder.layers[index] = with_experts(type(layer), decoder.config, index, name, count)
            decoder.register_forward_hook(functools.partial(_level_router_logits, getattr(decoder.config, name)))
            self.post_init()

        def save_pretrained(self, folder, *arguments, **keywords):
            """As transformers' own, with the code for other programs."""
            self.config.auto_map = remote_code.auto_map(family)
            super().save_pretrained(folder, *arguments, **keywords)
            remote_code.write_code(Path(folder), self.config.to_dict())

    config_class = type(_class_name(base_config.__name__), (base_config,), {"model_type": model_type, "__module__": __name__})
    register_model(config_class, Model, base_model, _class_name(base_model.__name__))
    for known, new in ((family, model_type), (base_model.__name__, _class_name(base_model.__name__))):
        names = get_checkpoint_conversion_mapping(known)
        if names is not None:
            register_checkpoint_conversion_mapping(new, names)
    return config_class, Model


def _level_router_logits(most: int, base_model: nn.Module, arguments: tuple, output: object) -> None:
    """Fill every layer's router logits [T, experts of the layer] up to `most` experts with minus infinity, an expert that is
    never chosen: transformers' load-balancing loss adds layers up."""
    logits = getattr(output, "router_logits", None)
    if logits:
        output.router_logits = tuple(nn.functional.pad(x, (0, most - x.shape[-1]), value=-torch.inf) for x in logits)


def register_model(config_class: type, model: type, base_model: type, name: str) -> None:
    """Make the Auto classes that take `base_model` take `model`, derived from it and called `name`, for a configuration class."""
    # transformers decides both by searching the class's file for its usual code; the family's answer is the right one.
    model._can_set_attn_implementation = classmethod(lambda cls: base_model._can_set_attn_implementation())
    model._can_set_experts_implementation = classmethod(lambda cls: base_model._can_set_experts_implementation())
    model.__name__ = model.__qualname__ = name
    base_config, model.config_class = base_model.config_class, config_class
    for auto in auto_of(base_config):
        auto.register(config_class, model)


def with_experts(layer_class: type, config: PreTrainedConfig, index: int, name: str, count: int):
    """Decoder layer `index` with `count` experts; `name` is the family's field for the count."""
    layer_config = copy.copy(config)
    setattr(layer_config, name, count)
    layer = layer_class(layer_config, index)
    # Later changes of the model's configuration must reach this layer.
    for module in layer.modules():
        if getattr(module, "config", None) is layer_config:
            module.config = config
    return layer
