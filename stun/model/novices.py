"""Checkpoints with novices: experts that are a constant vector each, and that the whole router still chooses (MoNE, arXiv
2507.00390).

The form is vLLM's (its design/expert_substitution.md): config.json keeps the family's model type and number of experts and lists
the novices of each layer in `approximate_experts`; the other experts keep their numbers, and `experts.N.approx_value` [D] stands
for novice N. After `import stun`, `AutoModelForCausalLM` loads, runs and saves it; without, transformers would fill the missing
experts with random weights.

Shapes: T tokens, K top-k, D hidden, X novices of a layer.
"""

import functools

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from stun.model.families import NOVICES, count_field
from stun.model.heterogeneous import register_model, with_experts
from stun.model.layer_layout import CONSTANT, EXPERT_NUMBER, renumber
from stun.model.tensor_names import experts_of, width_of
from stun.model.text_part import class_of


def stock(config: PreTrainedConfig) -> PreTrainedConfig:
    """The family's own configuration, without novices."""
    if NOVICES not in config.__dict__:
        return config
    content = config.to_dict()
    content.pop(NOVICES)
    return type(config).__mro__[1].from_dict(content)


class _Constant(nn.Module):
    """A novice."""

    def __init__(self, width: int):
        super().__init__()
        setattr(self, CONSTANT, nn.Parameter(torch.zeros(width)))


@functools.cache
def _experts_class(base: type) -> type:
    """Experts of a layer with novices, derived from the family's: a novice's routes go to expert 0 with weight zero, as in vLLM,
    and its constant is added."""

    class Experts(base):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            route_TK = torch.tensor(self.routes, device=top_k_index.device)[top_k_index]
            is_novice_TK, width = route_TK < 0, len(self.novices)
            output_TD = super().forward(hidden_states, route_TK.clamp_min(0), top_k_weights.masked_fill(is_novice_TK, 0))
            gates_TX = top_k_weights.new_zeros(len(route_TK), width + 1, dtype=torch.float32)
            gates_TX.scatter_add_(1, torch.where(is_novice_TK, -1 - route_TK, width), top_k_weights.float())
            constants_XD = torch.stack([getattr(self.get_submodule(str(novice)), CONSTANT) for novice in self.novices])
            return output_TD + (gates_TX[:, :width] @ constants_XD.float()).to(output_TD.dtype).view_as(output_TD)

    return Experts


def _put_novices(layer: nn.Module, config: PreTrainedConfig, index: int, novices: list[int], count: str) -> None:
    """Replace the experts of a layer by fewer and novices."""
    total = getattr(config, count)
    small = with_experts(type(layer), config, index, count, total - len(novices))
    path, experts = experts_of(small)
    experts.__class__ = _experts_class(type(experts))
    experts.novices = novices
    others = [expert for expert in range(total) if expert not in novices]
    experts.routes = [-1 - novices.index(e) if e in novices else others.index(e) for e in range(total)]
    for novice in novices:
        experts.add_module(str(novice), _Constant(width_of(experts)))
    layer.set_submodule(path, experts)


@functools.cache
def config_class(base_config: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Configuration class of a family's checkpoints with novices, whose model class is registered with the Auto class."""
    count = count_field(base_config())
    base_model = class_of(base_config)

    class Model(base_model):
        def __init__(self, config, *arguments, **keywords):
            super().__init__(config, *arguments, **keywords)
            for index, novices in getattr(config, NOVICES).items():
                _put_novices(self.base_model.layers[int(index)], config, int(index), list(novices), count)
            self.post_init()

        @classmethod
        def is_custom_code(cls) -> bool:
            """As the family's own class: transformers passes over the root's conversions of names for code of others."""
            return base_model.is_custom_code()

        def save_pretrained(self, folder, is_main_process=True, state_dict=None, **keywords):
            """As transformers' own, with the experts under their own numbers."""
            tensors = revert_weight_conversion(self, self.state_dict() if state_dict is None else state_dict)
            total, listed = getattr(self.config, count), getattr(self.config, NOVICES)
            kept = {int(index): sorted(set(range(total)) - set(novices)) for index, novices in listed.items()}
            named = {_own_name(name, kept): tensor for name, tensor in tensors.items()}
            super().save_pretrained(folder, is_main_process, state_dict=named, save_original_format=False, **keywords)

    own_config = type(f"Novice{base_config.__name__}", (base_config,), {"__module__": __name__})
    register_model(own_config, Model, base_model, base_model.__name__)
    return own_config


def _own_name(name: str, kept: dict[int, list[int]]) -> str:
    """Name of a tensor with the number that its expert has in the checkpoint; `kept` are each layer's experts that are kept."""
    layer, expert = name.partition(".layers.")[2].split(".")[0], EXPERT_NUMBER.search(name)
    if not expert or name.endswith(CONSTANT) or not layer.isdecimal() or int(layer) not in kept:
        return name
    return renumber(name, kept[int(layer)][int(expert[2])])
