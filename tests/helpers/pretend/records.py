"""What this process did on its pretend GPUs: kernels and host syncs, collectives, contexts, memory."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

COUNTS: Counter[str] = Counter()  # "kernels", "syncs", and each by name: "kernels mm"
COLLECTIVES: list[str] = []  # in order: name, shapes and dtype
CONTEXTS: dict[int, set[str]] = {}  # threads by the GPU on which they would have made a context of this process
MEMORY = {"now": 0, "peak": 0}
CHOSEN = {"threads": 1, "bound": None}  # what was asked of torch: its threads, and the GPU that collectives are bound to
LOCK = threading.RLock()
_of_thread = threading.local()
_storages: dict[int, tuple[int, weakref.ref]] = {}


class Fault(RuntimeError):
    """What CUDA or NCCL would have refused, or what would not give the same bits twice."""


def note(kind: str, name: str, amount: int = 1) -> None:
    """Count `amount` kernels or syncs of that name."""
    with LOCK:
        COUNTS[kind] += amount
        COUNTS[f"{kind} {name}"] += amount


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Context whose value holds, at its end, what was counted in it."""
    before, found = COUNTS.copy(), Counter()
    yield found
    found.update(COUNTS - before)


def current() -> int:
    """Current GPU of this thread: 0 in every new one, whatever another has set."""
    return getattr(_of_thread, "device", 0)


def set_current(number: int) -> None:
    """Since CUDA 12, cudaSetDevice makes the context."""
    _of_thread.device = number
    context(number)


def context(number: int) -> None:
    """This thread uses that GPU."""
    with LOCK:
        CONTEXTS.setdefault(number, set()).add(threading.current_thread().name.partition("_")[0].rstrip("0123456789-"))


def hold(inner: torch.Tensor) -> None:
    """Count a tensor's memory for as long as it lives."""
    storage = inner.untyped_storage()
    key, nbytes = storage._cdata, storage.nbytes()
    if key in _storages:
        return
    MEMORY["now"] += nbytes
    MEMORY["peak"] = max(MEMORY["peak"], MEMORY["now"])

    def freed(_: weakref.ref) -> None:
        MEMORY["now"] -= _storages.pop(key, (0,))[0]

    _storages[key] = nbytes, weakref.ref(storage, freed)
