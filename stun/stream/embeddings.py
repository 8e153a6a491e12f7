"""Embedding, final norm and output head, on every rank."""

from contextlib import AbstractContextManager

import torch

from stun.model.architecture import Architecture
from stun.model.precision import compute_dtype
from stun.runtime.ranks import Ranks
from stun.stream.layer_stream import installed


def outside(arch: Architecture, ranks: Ranks) -> AbstractContextManager:
    """Context with these weights installed: `arch.enter` needs no embedding, `arch.leave` works. The first rank reads them."""
    return installed(arch, ranks, arch.source.read, arch.outer_groups.values())


def outside_bytes(arch: Architecture, device: torch.device) -> int:
    """Bytes of these weights in the compute dtype."""
    return sum(arch.info(name).numel for name in arch.outer_weights) * compute_dtype(arch, device).itemsize
