"""Embedding, final norm and output head, on every rank."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stun.model.architecture import Architecture
from stun.model.precision import compute_dtype
from stun.runtime.ranks import Ranks
from stun.stream.layer_stream import from_first


@contextmanager
def outside(arch: Architecture, ranks: Ranks) -> Iterator[None]:
    """Context with these weights installed: `arch.enter` needs no embedding, `arch.leave` works. The first rank reads them."""
    placeholders, dtype = list(_places(arch)), compute_dtype(arch, ranks.device)
    for name in arch.outer_weights:
        arch.install_outer({name: from_first(arch, ranks, name, arch.source.read)}, dtype)
    try:
        yield
    finally:
        for module, name, parameter in placeholders:
            module._parameters[name] = parameter


def _places(arch: Architecture) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """(module, name, parameter) of all parameters outside the layers."""
    inside = {id(module) for layer in arch.decoder.layers for module in layer.modules()}
    for module in arch.model.modules():
        if id(module) not in inside:
            yield from ((module, name, parameter) for name, parameter in module._parameters.items() if parameter is not None)


def outside_bytes(arch: Architecture, device: torch.device) -> int:
    """Bytes of these weights in the compute dtype."""
    return sum(arch.info(name).numel for name in arch.outer_weights) * compute_dtype(arch, device).itemsize
