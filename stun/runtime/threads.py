"""Work side by side on the cores of a rank, every piece of it on one thread.

What one thread computes does not depend on how many there are, while torch's own use of several threads shows in the last bits
of some functions, and of products in bfloat16. Small pieces are faster so, too: no call waits for the slowest of its threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")
MOST = 16  # workers of a rank: each may hold a matrix converted to what is computed in


def _settle() -> None:
    """What torch keeps by thread."""
    torch.get_num_threads()  # else the thread's first operation takes over the number that another thread has set last
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def workers_on(device: torch.device) -> int:
    """How many a rank has: one for each thread that the calling thread has; on GPUs, which one thread feeds, that thread."""
    return min(torch.get_num_threads(), MOST) if device.type == "cpu" else 1


class Workers:
    """The workers of this rank, `count` of them."""

    def __init__(self, device: torch.device):
        self.count, is_cpu = workers_on(device), device.type == "cpu"
        # A single worker, too, is a thread of its own: stun.runtime.determinism looks at what the calling one does.
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="work", initializer=_settle) if is_cpu else None

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """What `function` gives for each item, in their order; raises what the first of them that fails raised. It may not call
        this itself."""
        return list((self._pool.map if self._pool else map)(function, items))


@contextmanager
def one_thread() -> Iterator[None]:
    """What gives other last bits with another number of threads, as LAPACK's factorisations do, has one here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
