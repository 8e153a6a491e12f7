"""Streams and events of the pretend device.

Kernels run at once; asynchronous copies wait in the queue of their stream until something that must come after them runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from helpers.pretend.records import LOCK, context, current, note, set_current

_of_thread = threading.local()
_awaited: list[tuple[Stream, int]] = []  # what the default stream waits for, run before its next kernel


class Stream:
    """Queue of copies; `taken` counts those that have left it, `done` those that have run: another thread must not see the end of
    one that is running."""

    def __init__(self, device: object = None, priority: int = 0, **_):
        self.device = torch.device("cuda", current()) if device is None else torch.device(device)
        self.queue: list[Callable[[], None]] = []
        self.taken = self.done = 0

    @property
    def mark(self) -> int:
        """Place behind all that is queued."""
        with LOCK:
            return self.taken + len(self.queue)

    def run_to(self, mark: int) -> None:
        """Run what is queued before that place."""
        with LOCK:
            while self.taken < mark and self.queue:
                self.taken += 1
                self.queue.pop(0)()
                self.done += 1

    def wait(self, other: Stream, mark: int) -> None:
        """Later work of this stream comes after what `other` has before that place."""
        with LOCK:
            if self is DEFAULT:
                _awaited.append((other, mark))
            elif other is not DEFAULT:
                self.queue.append(lambda: other.run_to(mark))

    def wait_stream(self, other: Stream) -> None:
        self.wait(other, other.mark)

    def wait_event(self, event: Event) -> None:
        if event.stream:
            self.wait(event.stream, event.mark)

    def synchronize(self) -> None:
        note("syncs", "stream")
        self.run_to(self.mark)

    def query(self) -> bool:
        return not self.queue

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    """Place in a stream's queue."""

    def __init__(self, enable_timing: bool = False, **_):
        self.stream: Stream | None = None
        self.mark = 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or of_thread()
        self.mark = self.stream.mark

    def wait(self, stream: Stream | None = None) -> None:
        (stream or of_thread()).wait_event(self)

    def query(self) -> bool:
        return self.stream is None or self.stream.done >= self.mark

    def synchronize(self) -> None:
        if not self.query():
            note("syncs", "event")
            self.stream.run_to(self.mark)

    def elapsed_time(self, other: Event) -> float:
        return 1.0


DEFAULT = Stream("cuda:0")


def of_thread() -> Stream:
    """Current stream of this thread."""
    return getattr(_of_thread, "stream", None) or DEFAULT


def catch_up(with_results: bool = False) -> None:
    """Run what must have run before a kernel of this thread's stream; `with_results` what goes from the GPU to the host too."""
    stream = of_thread()
    with LOCK:
        if stream is not DEFAULT:
            stream.run_to(stream.mark)
            return
        while _awaited:
            other, mark = _awaited.pop(0)
            other.run_to(mark)
        if with_results or any(not getattr(work, "is_result", False) for work in DEFAULT.queue):
            DEFAULT.run_to(DEFAULT.mark)


def queue_copy(copy: Callable[[], None], is_result: bool) -> None:
    """Queue a copy on this thread's stream; `is_result`: to the host, which sees it after a sync alone."""

    def work() -> None:
        copy()

    work.is_result = is_result
    with LOCK:
        of_thread().queue.append(work)


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """torch.cuda.stream; its end sets the stream that was current before, and the device of that one (cudaSetDevice)."""
    if stream is None:
        yield
        return
    before, device = of_thread(), current()
    _of_thread.stream = stream
    set_current(stream.device.index or 0)
    try:
        yield
    finally:
        _of_thread.stream = before
        if device != current():
            set_current(device)


def synchronize(*_) -> None:
    """torch.cuda.synchronize."""
    note("syncs", "device")
    context(current())
    catch_up(with_results=True)
