"""Padding: experts of zeros that fill every layer up to one number, for runtimes that build all layers from it.

A router's bias of -1e4 keeps them from ever being chosen, so that the layer computes what it did. In routers with groups every
group is filled up, because they take the groups to be neighbours of equal number.
"""

import torch

from stun.checkpoint.writer import Stacked, Tensors
from stun.model.layer_layout import EXPERT_NUMBER, renumber
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream

NEVER = -1e4  # far below every score, and a number in float16 too


def _places(kept: int, most: int, groups: int) -> list[int]:
    """Number of each expert kept among `most`, with as many in every routing group."""
    return [place // (kept // groups) * (most // groups) + place % (kept // groups) for place in range(kept)]


def padding(kept: int, most: int, groups: int) -> list[int]:
    """Numbers of the experts of zeros, ascending."""
    return sorted(set(range(most)) - set(_places(kept, most, groups)))


def padded(stream: LayerStream, layer: Layer, tensors: Tensors, most: int) -> Tensors:
    """Tensors that this rank writes of a layer with `most` experts, from those of the layer with the experts kept."""
    layout, kept, groups = layer.layout, len(layer.kept), stream.arch.groups
    if not layout.experts or kept == most:
        return tensors
    places, filled = _places(kept, most, groups), {}
    for name, tensor in tensors.items():
        number = EXPERT_NUMBER.search(name)
        if name in layout.routed:
            filled[name] = _with_entries(tensor, places, most, layout.routed[name], NEVER if name in layout.biases else 0)
        elif isinstance(tensor, Stacked):
            entries = [torch.zeros_like(tensor.entries[0])] * most
            for place, entry in zip(places, tensor.entries, strict=True):
                entries[place] = entry
            filled[name] = Stacked(entries)
        else:
            filled[renumber(name, places[int(number[2])]) if number else name] = tensor
    return filled | (_zeros(stream, layer, padding(kept, most, groups)) if stream.ranks.is_first else {})


def _with_entries(tensor: torch.Tensor, places: list[int], most: int, dim: int, value: float) -> torch.Tensor:
    """A router's tensor with `most` entries along `dim`, its own at `places` and `value` elsewhere."""
    shape = [*tensor.shape[:dim], most, *tensor.shape[dim + 1 :]]
    index = torch.tensor(places, device=tensor.device)
    return tensor.new_full(shape, value).index_copy_(dim, index, tensor)


def _zeros(stream: LayerStream, layer: Layer, numbers: list[int]) -> dict[str, torch.Tensor]:
    """Experts of zeros that are stored one by one; they share the memory of one."""
    parts = layer.layout.experts[0]
    infos = {name: stream.arch.info(name) for part in parts.keys() - layer.layout.fused for name in parts[part]}
    one = {name: torch.zeros(info.shape, dtype=info.dtype, device=stream.ranks.device) for name, info in infos.items()}
    return {renumber(name, number): zeros for number in numbers for name, zeros in one.items()}
