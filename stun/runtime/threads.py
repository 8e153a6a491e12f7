"""Worker threads of a rank; each task runs on one of them.

The result of one thread does not depend on their number, whereas torch's own multithreading changes the last bits of some
functions and of bfloat16 products. For small tasks this is faster too: no call waits for the slowest of its threads.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")
MOST = 16  # workers of a rank: each may hold a copy of a matrix in the compute dtype


def _settle() -> None:
    """Settings that torch keeps per thread."""
    # Without this call the thread's first operation would take over the number of threads that another thread set last.
    torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def workers_on(device: torch.device) -> int:
    """Number of workers of a rank: that of torch's threads on a CPU; 1 on a GPU, which the calling thread keeps busy."""
    return min(torch.get_num_threads(), MOST) if device.type == "cpu" else 1


def threads_on(device: torch.device, count: int, name: str) -> ThreadPoolExecutor:
    """Pool of `count` threads for work on this rank's device."""
    # A new thread is on GPU 0, where whatever returns to "the device before" would make a context of some 500 MB for every rank.
    start = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
    return ThreadPoolExecutor(count, thread_name_prefix=name, **start)


class Workers:
    """Pool of this rank's `count` workers."""

    def __init__(self, device: torch.device):
        self.count, is_cpu = workers_on(device), device.type == "cpu"
        # Even a single worker is a separate thread, since stun.runtime.determinism intercepts the calling thread's operations.
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="work", initializer=_settle) if is_cpu else None

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Results of `function` for all items, in order; raises the error of the first item that fails. `function` must not
        call `map`: it would wait for itself."""
        if not self._pool:
            return list(map(function, items))
        given = list(items)
        results: dict[int, B] = {}
        errors: dict[int, BaseException] = {}
        rest = iter(range(len(given)))

        def work() -> None:
            # Every worker takes items until none is left: waking a thread for each costs more than most of them.
            for number in rest:
                try:
                    results[number] = function(given[number])
                except BaseException as error:
                    errors[number] = error
                    list(rest)  # no other is begun; all before it were

        try:
            for future in [self._pool.submit(work) for _ in range(min(self.count, len(given)))]:
                future.result()
            if errors:
                raise errors[min(errors)]
            return [results[number] for number in range(len(given))]
        finally:
            list(rest)  # an interrupt of this thread ends the others' work too
            errors.clear()  # whose tracebacks hold this call's items


@contextmanager
def one_thread() -> Iterator[None]:
    """Context for operations whose last bits depend on the number of threads, such as LAPACK's factorisations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
