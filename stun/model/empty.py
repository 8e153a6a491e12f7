"""Building of modules on the meta device."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode


class _LargeOnMeta(TorchFunctionMode):
    """Mode that creates large tensors on the meta device from the start.

    `init_empty_weights` alone allocates every parameter before it drops it, and one parameter of a released model (all experts
    of a layer in float32) can exceed the memory.
    """

    LARGE = 2**22

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.empty, torch.zeros, torch.ones, torch.randn):
            shape = args[0] if args and isinstance(args[0], (tuple, list)) else args
            if math.prod(shape) > self.LARGE:
                kwargs = {**kwargs, "device": "meta"}
        if function is torch.arange and any(isinstance(bound, (int, float)) and abs(bound) > self.LARGE for bound in args):
            kwargs = {**kwargs, "device": "meta"}
        if function is torch.Tensor.contiguous and args[0].numel() > self.LARGE:
            args = (args[0].to("meta"), *args[1:])
        return function(*args, **kwargs)


@contextmanager
def without_weights() -> Iterator[None]:
    """Context in which modules get parameters on the meta device, but real buffers (rotary frequencies)."""
    with init_empty_weights(include_buffers=False), _LargeOnMeta():
        yield
