"""Copies between host memory and a GPU, beside what the GPU computes.

Each thread that copies has a stream of its own and two pinned buffers: while one is on its way, the other is filled or emptied.
Copies straight from or to ordinary memory would hold up the stream that computes.
"""

from __future__ import annotations

import threading

import torch

BUFFER, BUFFERS = 64 * 2**20, 2  # bytes, and how many of them a thread has
_own = threading.local()


class _Lane:
    """What one thread copies with."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.buffers = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]
        self.events = [torch.cuda.Event() for _ in range(BUFFERS)]

    def to_device(self, source_N: torch.Tensor, target_N: torch.Tensor) -> None:
        """Bytes from the host; what is queued on the current stream afterwards finds them there."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # of whose memory the target may have been made
        for place, start in enumerate(range(0, len(source_N), BUFFER)):
            piece = source_N[start : start + BUFFER]
            buffer, event = self.buffers[place % BUFFERS][: len(piece)], self.events[place % BUFFERS]
            event.synchronize()
            buffer.copy_(piece)
            with torch.cuda.stream(self.stream):
                target_N[start : start + BUFFER].copy_(buffer, non_blocking=True)
                event.record(self.stream)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def to_host(self, source_N: torch.Tensor, target_N: torch.Tensor) -> None:
        """Bytes from the GPU, once what has been queued there is done."""
        self.stream.wait_stream(torch.cuda.default_stream(self.device))
        on_the_way: list[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]] = []

        def arrive() -> None:
            piece, buffer, event = on_the_way.pop(0)
            event.synchronize()
            piece.copy_(buffer)

        for place, start in enumerate(range(0, len(source_N), BUFFER)):
            if len(on_the_way) == BUFFERS:
                arrive()
            piece = target_N[start : start + BUFFER]
            buffer, event = self.buffers[place % BUFFERS][: len(piece)], self.events[place % BUFFERS]
            with torch.cuda.stream(self.stream):
                buffer.copy_(source_N[start : start + BUFFER], non_blocking=True)
                event.record(self.stream)
            on_the_way.append((piece, buffer, event))
        while on_the_way:
            arrive()


def _lane(device: torch.device) -> _Lane:
    if getattr(_own, "lane", None) is None or _own.lane.device != device:
        _own.lane = _Lane(device)
    return _own.lane


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`: itself on CPUs."""
    if device.type == "cpu":
        return tensor
    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if tensor.numel():
        _lane(device).to_device(_bytes(tensor), _bytes(moved))
    return moved


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of either on the host: itself on CPUs. What is copied must not change any more."""
    if tensor.device.type == "cpu":
        return tensor
    moved = torch.empty(tensor.shape, dtype=tensor.dtype)
    if tensor.numel():
        _lane(tensor.device).to_host(_bytes(tensor), _bytes(moved))
    return moved
