"""Values that a model carries from layer to layer beside the hidden states, found without running a layer.

The model's forward is recorded with stand-ins for the outputs of its layers. An argument of a later layer that is one of them, or
was computed from them, is an expression, which is evaluated once the outputs are there.
"""

import json
from collections.abc import Iterator, MutableMapping
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

HIDDEN = ""  # name, among a layer's arguments, of hidden states that are more than what the layer before gave
_SHAPES = ("__get__", "__len__", "__repr__", "dim", "is_floating_point", "numel", "size")


class Key(NamedTuple):
    """A carried value: output `place` of layer `source`, or entry `place` of a dictionary that layers fill, the argument
    `source`; of an entry that is a tuple, its tensor `part`."""

    source: int | str
    place: int | str
    part: int = -1

    def __str__(self) -> str:
        return json.dumps(self)

    @classmethod
    def parse(cls, text: str) -> "Key":
        return cls(*json.loads(text))


Carried = dict[Key, torch.Tensor]


class Unpacked(Exception):
    """The model takes several outputs from a layer."""


class Later:
    """Stand-in for an output beside the hidden states, of which nothing is known but that it is handed on."""

    def __init__(self, key: Key):
        self.key = key


class StandIn(torch.Tensor):
    """Stand-in, on the meta device, for the hidden states of a layer (`made` is their key) or what was computed from them (`made`
    is the function, its arguments, and the place in its result)."""

    @staticmethod
    def of(tensor: torch.Tensor, made: object) -> "StandIn":
        own = torch.Tensor._make_subclass(StandIn, tensor.to("meta"))
        own.made = made
        return own

    def __iter__(self):
        raise Unpacked

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        on_meta = tree_map_only(torch.Tensor, lambda leaf: _plain(leaf).to("meta"), (arguments, keywords))
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*on_meta[0], **on_meta[1])
        leaves, spec = tree_flatten(result)
        if getattr(function, "__name__", "") in _SHAPES or not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            return result
        made = [
            StandIn.of(leaf, (function, arguments, keywords, place)) if isinstance(leaf, torch.Tensor) else leaf
            for place, leaf in enumerate(leaves)
        ]
        return tree_unflatten(made, spec)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor) if isinstance(tensor, StandIn) else tensor


def stand_ins(layer: int, hidden: torch.Tensor, outputs: int) -> object:
    """What a layer of so many outputs gives, hidden states like `hidden` first."""
    first = StandIn.of(_plain(hidden), Key(layer, 0))
    return first if outputs == 1 else (first, *(Later(Key(layer, place)) for place in range(1, outputs)))


def is_expression(value: object) -> bool:
    return isinstance(value, (Later, StandIn))


def needs(value: object) -> set[Key]:
    """Outputs of layers that an argument is made of."""
    if isinstance(value, Later):
        return {value.key}
    if isinstance(value, StandIn):
        return {value.made} if isinstance(value.made, Key) else needs(value.made[1:3])
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return {key for entry in values for key in needs(entry)}


def evaluated(value: object, carried: Carried) -> object:
    """An argument with the outputs of layers in place of the stand-ins; an output that a layer does not give is None."""
    if isinstance(value, Later):
        return carried.get(value.key)
    if isinstance(value, StandIn):
        if isinstance(value.made, Key):
            return carried[value.made]
        function, arguments, keywords, place = value.made
        return tree_flatten(function(*evaluated(arguments, carried), **evaluated(keywords, carried)))[0][place]
    if isinstance(value, (dict, list, tuple)) and needs(value):
        if isinstance(value, dict):
            return {name: evaluated(entry, carried) for name, entry in value.items()}
        return type(value)(evaluated(entry, carried) for entry in value)
    return value


def filled(like: MutableMapping, name: str, carried: Carried) -> MutableMapping:
    """The dictionary that layers fill, the argument `name`, with what earlier layers have put there."""
    own = type(like)()
    for key in (key for key in carried if key.source == name):
        if key.part < 0:
            own[key.place] = carried[key]
        else:
            own[key.place] = (*own.get(key.place, ()), carried[key])
    return own


def entries(name: str, dictionary: MutableMapping) -> Iterator[tuple[Key, torch.Tensor]]:
    """The tensors in such a dictionary. Raises TypeError for anything else in it."""
    for place, value in dictionary.items():
        parts = enumerate(value) if isinstance(value, tuple) else [(-1, value)]
        for part, tensor in parts:
            if not isinstance(tensor, torch.Tensor) or not isinstance(place, (int, str)):
                raise TypeError(f"{name}[{place!r}] is no tensor")
            yield Key(name, place, part), tensor
