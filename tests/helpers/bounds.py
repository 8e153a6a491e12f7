"""Bounds of memory and time around what a test does."""

from __future__ import annotations

import resource
import signal
from contextlib import contextmanager
from pathlib import Path

SECONDS = 60  # long enough for a machine that others use too
SLACK = 2**29  # address space that threads and allocators take whatever they are asked


class Hang(BaseException):
    """No handler of errors takes it for one."""


def allocated() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def bounded(nbytes: int, seconds: int = SECONDS):
    """Within it there is address space for `nbytes` more and SLACK, and an end after so many seconds."""

    def ring(*_):
        raise Hang

    before, limits = signal.signal(signal.SIGALRM, ring), resource.getrlimit(resource.RLIMIT_AS)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (allocated() + nbytes + SLACK, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def causes(error: BaseException | None):
    while error:
        yield error
        error = error.__cause__ or error.__context__
