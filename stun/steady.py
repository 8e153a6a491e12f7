"""Elementwise functions whose last bits do not depend on the number of threads.

torch cuts a large tensor into one piece a thread and computes each with vector instructions, but what is left over at a
piece's end with scalar ones, whose exponential differs in the last bit. Products are MKL's concern (see stun/__init__), sums
run along rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stun.sparsify.scores import one_thread

_NAMES = "silu gelu sigmoid tanh exp exp2 expm1 erf log log2 log1p softplus mish hardswish elu sin cos pow rsqrt reciprocal"
_UNSTEADY = {
    getattr(torch.ops.aten, name + suffix)
    for name in _NAMES.split()
    for suffix in ("", "_")
    if hasattr(torch.ops.aten, name + suffix)
}


class Steady(TorchDispatchMode):
    """Inside it, on CPUs, these functions run on one thread: they are a thousandth of a layer's work."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket not in _UNSTEADY:
            return function(*arguments, **(keywords or {}))
        with one_thread():
            return function(*arguments, **(keywords or {}))


def steady(device: torch.device) -> AbstractContextManager:
    """Where a layer computes. Neither GPUs nor a single thread need it."""
    return Steady() if device.type == "cpu" and torch.get_num_threads() > 1 else nullcontext()
