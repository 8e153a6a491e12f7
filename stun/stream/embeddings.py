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
    dtype = compute_dtype(arch, ranks.device)
    with arch.outside_restored():
        for names in arch.outer_groups:
            arch.install_outer({name: from_first(arch, ranks, name, arch.source.read) for name in names}, dtype)
        yield


def outside_bytes(arch: Architecture, device: torch.device) -> int:
    """Bytes of these weights in the compute dtype."""
    return sum(arch.info(name).numel for name in arch.outer_weights) * compute_dtype(arch, device).itemsize
