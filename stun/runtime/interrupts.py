"""Interruption of a job by Ctrl-C or SIGTERM."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Handlers that are replaced. Others, such as submitit's, are left, and so are ignored signals.
_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


@contextmanager
def interruptible(end: Callable[[int], None]) -> Iterator[None]:
    """Call `end(number)`, which must end the process, when SIGINT or SIGTERM arrives inside the block.

    It is called in a thread of its own: Python runs no handler while the main thread waits in a collective or multiplies.
    """
    signals = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) in _DEFAULT]
    if not signals:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watch = threading.Thread(target=_watch, args=(reader, signals, end), name="interrupts", daemon=True)
    watch.start()
    # The interpreter writes the number of every signal that has a handler of Python's into this pipe, whatever Python does.
    handlers, wakeup = {number: signal.signal(number, lambda *_: None) for number in signals}, signal.set_wakeup_fd(writer)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)
        watch.join()
        os.close(reader)


def _watch(reader: int, signals: list[int], end: Callable[[int], None]) -> None:
    while number := os.read(reader, 1):
        if number[0] in signals:
            end(number[0])
