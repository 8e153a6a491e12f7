"""Code beside a checkpoint whose layers keep different numbers of experts, for runtimes that have only transformers.

`modeling_stun.py` derives the classes from the family's own and needs nothing of this package; `auto_map` in config.json names
them. It runs where a user passes `trust_remote_code`. This package takes its own classes (stun.model.heterogeneous) and never
runs code of a checkpoint.
"""

import functools
from pathlib import Path

from transformers import AutoModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stun.files import write_atomically
from stun.model.families import HETEROGENEOUS, count_field
from stun.model.text_part import auto_of, build, class_of, text_part

FILE = "modeling_stun.py"
_TEXT = '''"""{family} with a number of experts of its own in every layer: config.json's `experts_per_layer` (0: a dense layer).

For transformers 5.17 or later, and runtimes that build models with it: pass trust_remote_code=True.
"""

import copy

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from {config_module} import {config}
from {module} import {base}, {model}


class Stun{config}({config}):
    model_type = "{model_type}"


def level(base_model, arguments, output):
    """Router logits as wide as the fullest layer's: the load-balancing loss adds layers up."""
    logits = getattr(output, "router_logits", None)
    if logits:
        most = base_model.config.{count}
        output.router_logits = tuple(torch.nn.functional.pad(x, (0, most - x.shape[-1]), value=-torch.inf) for x in logits)


class OwnCounts:
    """Decoder layers built again, each with its own number of experts in place of `{count}`."""

    config_class = Stun{config}

    def __init__(self, config, *arguments, **keywords):
        super().__init__(config, *arguments, **keywords)
        layers = self.base_model.{path}layers{text}
        for index, count in enumerate(config.experts_per_layer):
            if count:
                own = copy.copy(config)
                own.{count} = count
                layers[index] = type(layers[index])(own, index)
                for module in layers[index].modules():
                    if getattr(module, "config", None) is own:
                        module.config = config  # later changes of it must reach this layer
        if self.base_model is not self:
            self.base_model.register_forward_hook(level)
        self.post_init()

    # transformers would search this file for the code that it finds in the family's.
    @classmethod
    def _can_set_attn_implementation(cls):
        return {base}._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls):
        return {base}._can_set_experts_implementation()


class Stun{base}(OwnCounts, {base}):
    config_class = Stun{config}


class Stun{model}(OwnCounts, {model}):
    config_class = Stun{config}


names = get_checkpoint_conversion_mapping("{family}")
if names is not None and get_checkpoint_conversion_mapping("{model_type}") is None:
    register_checkpoint_conversion_mapping("{model_type}", names)
'''
_OF_CLASS = """
names = get_checkpoint_conversion_mapping("{model}")
if names is not None and get_checkpoint_conversion_mapping("Stun{model}") is None:
    register_checkpoint_conversion_mapping("Stun{model}", names)
"""


def _classes(family: str) -> dict[str, type]:
    """Auto class -> the family's class for it, the one that gives logits last."""
    config = CONFIG_MAPPING[family]
    autos = [auto_of(config)[0].__name__] if auto_of(config) else []
    return {"AutoConfig": config, "AutoModel": AutoModel._model_mapping[config], **dict.fromkeys(autos, class_of(config))}


def auto_map(family: str) -> dict[str, str]:
    """Auto class -> the class in the code that it shall load."""
    return {auto: f"{FILE.removesuffix('.py')}.Stun{own.__name__}" for auto, own in _classes(family).items()}


@functools.cache
def _text(family: str) -> tuple[str, str]:
    """Way from the base model of a family to its decoder, with a dot behind it, and the field for the number of experts."""
    config = CONFIG_MAPPING[family]()
    if config.get_text_config(decoder=True) is config:
        return "", count_field(config)
    whole = build(config)
    decoder = text_part(Path(family), whole).decoder
    path = next(path for path, module in whole.base_model.named_modules() if module is decoder)
    return f"{path}." if path else "", count_field(decoder.config)


def code(family: str) -> str:
    """Content of `FILE` for a family."""
    config, base, model = _classes(family).values()
    path, count = _text(family)
    has_own_names = get_checkpoint_conversion_mapping(model.__name__) is not None
    return (_TEXT + _OF_CLASS if has_own_names else _TEXT).format(
        family=family,
        model_type=HETEROGENEOUS + family,
        count=count,
        path=path,
        text=f"\n        config = self.base_model.{path}config" if path else "",
        config=config.__name__,
        base=base.__name__,
        model=model.__name__,
        config_module=config.__module__,
        module=model.__module__,
    )


@functools.cache
def is_describable(family: str) -> bool:
    """Whether there can be code for a family: transformers has a base model of it, and can build its default configuration."""
    try:
        return bool(code(family))
    except (KeyError, TypeError):
        return False


def _family(config: dict) -> str:
    """Family of a config.json that names the classes of `FILE` and no others; empty if it does not."""
    prefix, _, family = str(config.get("model_type")).partition(HETEROGENEOUS)
    is_named = not prefix and family in CONFIG_MAPPING and family != "arctic"
    return family if is_named and config.get("auto_map") == auto_map(family) else ""


def is_own(folder: Path, config: dict) -> bool:
    """Whether the code beside a checkpoint is what this package writes for the content of its config.json, byte by byte."""
    family = _family(config)
    return bool(family) and (folder / FILE).is_file() and (folder / FILE).read_bytes() == code(family).encode()


def without_missing(source: Path, config: dict) -> dict:
    """Content of config.json without the names of code that is not in `source`: none is fetched from the hub. Names of code in
    other repositories stay."""
    named = config.get("auto_map")
    if not isinstance(named, dict):
        return config
    places = {auto: place for auto, place in named.items() if _is_there(source, place)}
    others = {name: value for name, value in config.items() if name != "auto_map"}
    return others | ({"auto_map": places} if places else {})


def _is_there(source: Path, place: object) -> bool:
    """Whether a value of auto_map ("modeling_x.XModel", or a list) names files of `source`, or this package's own."""
    names = [str(name) for name in (place if isinstance(place, list) else [place]) if name is not None]
    files = [f"{name.partition('.')[0]}.py" for name in names if "--" not in name]
    return all(file == FILE or (source / file).is_file() for file in files)


def write_code(folder: Path, config: dict) -> None:
    """Write the code that the content of a config.json asks for, if any."""
    family = _family(config)
    if family:
        write_atomically(folder / FILE, lambda path: path.write_text(code(family)))
