"""Copies between host and GPU memory that overlap with the GPU's computation.

Each copying thread has a CUDA stream and two pinned buffers: one is in transfer while the other is filled or emptied. Copies
from or to pageable memory would block the stream that computes.
"""

import threading

import torch

BUFFER, BUFFERS = 64 * 2**20, 2  # bytes of a pinned buffer, buffers per thread
_of_thread = threading.local()


class _Lane:
    """Stream, pinned buffers and events of one copying thread."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.buffers = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]
        self.events = [torch.cuda.Event() for _ in range(BUFFERS)]

    def to_device(self, source_N: torch.Tensor, target_N: torch.Tensor) -> None:
        """Copy bytes from the host; work queued on the current stream afterwards waits for them."""
        # The allocator may have given the target memory that the current stream still uses.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
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
        """Copy bytes from the GPU, after the work queued on its default stream."""
        self.stream.wait_stream(torch.cuda.default_stream(self.device))
        in_transfer: list[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]] = []

        def arrive() -> None:
            piece, buffer, event = in_transfer.pop(0)
            event.synchronize()
            piece.copy_(buffer)

        for place, start in enumerate(range(0, len(source_N), BUFFER)):
            if len(in_transfer) == BUFFERS:
                arrive()
            piece = target_N[start : start + BUFFER]
            buffer, event = self.buffers[place % BUFFERS][: len(piece)], self.events[place % BUFFERS]
            with torch.cuda.stream(self.stream):
                buffer.copy_(source_N[start : start + BUFFER], non_blocking=True)
                event.record(self.stream)
            in_transfer.append((piece, buffer, event))
        while in_transfer:
            arrive()


def _lane(device: torch.device) -> _Lane:
    if getattr(_of_thread, "lane", None) is None or _of_thread.lane.device != device:
        _of_thread.lane = _Lane(device)
    return _of_thread.lane


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy of a host tensor on `device`; the tensor itself if that is a CPU."""
    if device.type == "cpu":
        return tensor
    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if tensor.numel():
        _lane(device).to_device(_bytes(tensor), _bytes(moved))
    return moved


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy of a GPU tensor, which must not change any more, on the host; a host tensor itself."""
    if tensor.device.type == "cpu":
        return tensor
    moved = torch.empty(tensor.shape, dtype=tensor.dtype)
    if tensor.numel():
        _lane(tensor.device).to_host(_bytes(tensor), _bytes(moved))
    return moved
