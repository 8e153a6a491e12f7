"""Memory that tensors are read into and written from, piece by piece and by several threads at once.

On the host that is the tensors themselves. A GPU is reached through a ring of pinned buffers on a stream of its own, so that
copies run beside the computation; copies from or to pageable memory would block it.
"""

import math
import mmap
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from queue import SimpleQueue
from weakref import finalize

import numpy as np
import torch

from stun.runtime.threads import one_thread, threads_on

PIECE = 16 * 2**20  # most bytes of one read, write or copy
THREADS = 4  # that read, and that write
AHEAD = 0.5  # share of a GPU's free memory for what is read ahead; the rest is for the layer that computes
BUFFERS = 8  # pinned ones of a ring; more than threads, so that some are in transfer while others are filled or emptied


def read_ahead(nbytes: int, free: float) -> int:
    """Bytes of a next layer of `nbytes` that a GPU with `free` bytes holds beside the running one."""
    return min(nbytes, int(AHEAD * max(0, free)))


class HostMemory:
    """Pages of the host. A tensor that is freed leaves its pages to the next one of its size: a page costs more to get from the
    system, which clears it, than to fill."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = defaultdict(list)

    def empty(self, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8, in pages of its own: those of an allocator would stay with it."""
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        free = self._free[nbytes]
        try:
            pages = free.pop()
        except IndexError:
            pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        content = np.frombuffer(pages, np.uint8)
        finalize(content, free.append, pages).atexit = False
        return torch.from_numpy(content)

    def room_ahead(self, reserved: int = 0) -> float:
        """Bytes of the next layer that may be read beside the one that computes, if that needs `reserved` bytes more."""
        return math.inf

    def trim(self) -> None:
        """Return free pages to the system."""
        for free in self._free.values():
            free.clear()

    def fill(self, target_N: torch.Tensor, read: Callable[[memoryview, int], None]) -> None:
        """Fill bytes by `read(view, start)`, which gets parts of them in order, each with its first byte's place in the whole."""
        read(memoryview(target_N.numpy()), 0)

    @contextmanager
    def view(self, source_N: torch.Tensor) -> Iterator[memoryview]:
        """At most PIECE bytes on the host, while the context lasts."""
        yield memoryview(source_N.numpy())

    def computing(self) -> AbstractContextManager:
        """Context for operations on what a thread has just filled, beside the other threads."""
        return one_thread()

    def arrive(self) -> None:
        """Let work that is queued from here on see everything that was filled."""

    def depart(self) -> None:
        """Let views from here on see the results of all work that was queued."""


class DeviceMemory:
    """Memory of a GPU, behind a ring of pinned buffers. The methods are those of HostMemory."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self._ring: SimpleQueue[tuple[torch.Tensor, torch.cuda.Event]] = SimpleQueue()
        for _ in range(BUFFERS):
            event = torch.cuda.Event(blocking=True)  # who waits for it sleeps: other threads need the cores
            self._ring.put((torch.empty(PIECE, dtype=torch.uint8, pin_memory=True), event))

    def empty(self, nbytes: int) -> torch.Tensor:
        content_N = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self.depart()  # the allocator may have given memory that work queued on the computing stream still uses
        return content_N

    def room_ahead(self, reserved: int = 0) -> float:
        allocator = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return (torch.cuda.mem_get_info(self.device)[0] + allocator - reserved) * AHEAD

    def trim(self) -> None:
        """Nothing: the allocator of the GPU uses freed blocks again, for whatever needs them."""

    def fill(self, target_N: torch.Tensor, read: Callable[[memoryview, int], None]) -> None:
        for start in range(0, len(target_N), PIECE):
            piece_n = target_N[start : start + PIECE]
            with self._buffer(len(piece_n)) as (buffer_n, event):
                read(memoryview(buffer_n.numpy()), start)
                with self.computing():
                    piece_n.copy_(buffer_n, non_blocking=True)
                    event.record(self.stream)

    @contextmanager
    def view(self, source_N: torch.Tensor) -> Iterator[memoryview]:
        with self._buffer(len(source_N)) as (buffer_N, event):
            with self.computing():
                buffer_N.copy_(source_N, non_blocking=True)
                event.record(self.stream)
            event.synchronize()
            yield memoryview(buffer_N.numpy())

    def computing(self) -> AbstractContextManager:
        return torch.cuda.stream(self.stream)

    def depart(self) -> None:
        self.stream.wait_stream(torch.cuda.default_stream(self.device))

    def arrive(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    @contextmanager
    def _buffer(self, nbytes: int) -> Iterator[tuple[torch.Tensor, torch.cuda.Event]]:
        """A pinned buffer that no copy uses any more, and the event that ends its next copy."""
        buffer, event = self._ring.get()
        try:
            event.synchronize()
            yield buffer[:nbytes], event
        finally:
            self._ring.put((buffer, event))


Memory = HostMemory | DeviceMemory


@contextmanager
def copiers(device: torch.device, count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that read or write pieces; what has not begun when the context ends is dropped."""
    pool = threads_on(device, count, "copy")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@cache
def _ring(device: torch.device, use: str) -> DeviceMemory:
    """The process' ring for one use of a GPU: pinning memory takes long."""
    return DeviceMemory(device)


def memory_to_read_into(device: torch.device) -> Memory:
    """Memory of `device` for tensors that are read."""
    return HostMemory() if device.type == "cpu" else _ring(device, "read")


def memory_to_write_from(device: torch.device) -> Memory:
    """Memory of `device` for tensors that are written."""
    return HostMemory() if device.type == "cpu" else _ring(device, "write")
