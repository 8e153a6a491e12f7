"""Routing of a model, found by building its layers: the field for the number of experts, experts of a token, their groups."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from stun.config import StunError
from stun.model.empty import without_weights
from stun.model.families import FLOORS, count_field
from stun.model.tensor_names import experts_of

if TYPE_CHECKING:
    from stun.model.architecture import Architecture

_TOP_K = ("num_experts_per_tok", "top_k_experts")  # names in the configuration, where routers do not keep the number


def built_layer(decoder: PreTrainedModel, index: int, field: str, num_experts: int) -> nn.Module:
    """Decoder layer `index` on the meta device, with so many experts by a field of the configuration, if one is named."""
    config = copy.deepcopy(decoder.config)
    if field:
        setattr(config, field, num_experts)
    with without_weights():
        return type(decoder.layers[index])(config, index)


def field_of_count(decoder: PreTrainedModel, folder: Path) -> str:
    """Name of the number of experts in the configuration: the field with which a layer gets one expert more. Empty for a model
    without experts. Raises StunError if there is none."""
    found = next(((i, named[1]) for i, layer in enumerate(decoder.layers) if (named := experts_of(layer))), None)
    if found is None:
        return ""
    index, experts = found
    first = count_field(decoder.config)
    numbers = [name for name, value in vars(decoder.config).items() if type(value) is int and value == experts.num_experts]
    for name in [first] if first else numbers:
        try:
            grown = experts_of(built_layer(decoder, index, name, experts.num_experts + 1))
        except Exception:  # whatever a family's code raises for a field that is none, or on which others depend
            continue
        if grown is not None and grown[1].num_experts == experts.num_experts + 1:
            return name
    raise StunError(f"{folder / 'config.json'}: {first or 'no field'} gives layers another number of experts")


def most_of_a_token(decoder: PreTrainedModel, folder: Path) -> int:
    """Experts that a token is routed to: the most of any layer. 0 for a model without experts. Raises StunError unless all
    layers' are whole numbers."""
    modules = [module for layer in decoder.layers if experts_of(layer) for module in layer.modules()]
    counts = [module.top_k for module in modules if hasattr(module, "top_k")]
    counts += [getattr(decoder.config, name, 0) for name in _TOP_K if modules and not counts]
    for number in counts:
        if type(number) is not int:
            raise StunError(f"{folder / 'config.json'}: a token's number of experts cannot be {str(number)[:80]}")
    return max(counts, default=0)


def router_of_groups(decoder: PreTrainedModel) -> nn.Module | None:
    """A router that knows groups of experts, be it one group; None if there is none."""
    modules = (module for layer in decoder.layers for module in layer.modules())
    return next((module for module in modules if hasattr(module, "num_group")), None)


def groups(arch: Architecture) -> tuple[int, int]:
    """Routing groups (1: none), and the fewest experts a group may keep. Raises StunError."""
    folder, counts = arch.source.folder, [layout.num_experts for layout in arch.layers if layout.experts]
    if not counts:
        return 1, 1
    if not 1 <= arch.top_k <= min(counts):
        raise StunError(f"{folder}: config.json asks for {arch.top_k} experts a token, a layer has {min(counts)}")
    router, number, chosen = router_of_groups(arch.decoder), 1, 1
    if router is not None and getattr(arch.config, "topk_method", None) != "greedy":
        number, chosen = router.num_group, router.topk_group
    if not isinstance(number, int) or not isinstance(chosen, int) or not 1 <= chosen <= number:
        raise StunError(f"{folder}: n_group={number}, topk_group={chosen}: 1 <= topk_group <= n_group is needed")
    floor = max(_fewest(arch, number), FLOORS.get(arch.model_type, 1), -(-arch.top_k // chosen))
    for count in counts if number > 1 else ():
        if count % number or count // number < floor:
            needed = f"equal groups of at least {floor} (top-k {arch.top_k} from {chosen} of them)"
            raise StunError(f"{folder}: {count} experts in n_group={number} groups; routing needs {needed}")
    return number, floor


def _fewest(arch: Architecture, number: int) -> int:
    """Fewest experts of a group with which the family's code builds and runs the block around the experts; where that does not
    run alone, the size that no known family exceeds."""
    first = -(-arch.top_k // number)
    known = max(first, 2 if number > 1 else 1)
    return next((size for size in range(first, first + 3) if _runs(arch, number * size)), known)


def _runs(arch: Architecture, num_experts: int) -> bool:
    layout = next(layout for layout in reversed(arch.layers) if layout.experts)
    try:
        layer = arch.build_layer(layout.index, num_experts)
        path, experts = experts_of(layer)
        experts.forward = lambda hidden, *_, **__: hidden
        block = layer.get_submodule(path.rpartition(".")[0]).to("meta")
        block(torch.empty(1, 2, arch.config.hidden_size, dtype=arch.config.dtype or torch.float32, device="meta"))
    except Exception:  # of many kinds: the family's code does not foresee so few
        return False
    return True
