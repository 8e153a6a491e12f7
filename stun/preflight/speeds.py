"""Rates of this machine, measured: its disk, and the products of one rank."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from stun.checkpoint.reader import Checkpoint
from stun.config import StunError
from stun.runtime.matmul import linear
from stun.runtime.threads import Workers

SAMPLE = 2**28  # bytes read, written or copied to measure a rate
_ROUNDS = 3
_CHUNK = 2**24


def best(work: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Seconds of the fastest round after one to warm up."""
    spent = []
    for _ in range(1 + _ROUNDS):
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        spent.append(time.perf_counter() - start)
    return min(spent[1:])


def wait_for(device: str | torch.device) -> None:
    """Return once a GPU has done what it was given; a CPU has by then."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def read_speed(source: Checkpoint, nbytes: int = SAMPLE) -> float:
    """Bytes/s of reading the head of the largest shard. The system is asked to forget it first; where it does not, this is the
    speed of its cache."""
    file = max({info.file for info in source.tensors.values()}, key=lambda file: file.stat().st_size)
    with file.open("rb", buffering=0) as handle:
        os.posix_fadvise(handle.fileno(), 0, nbytes, os.POSIX_FADV_DONTNEED)
        buffer, read, start = bytearray(_CHUNK), 0, time.perf_counter()
        while read < nbytes and (count := handle.readinto(buffer)):
            read += count
        return read / (time.perf_counter() - start)


def write_speed(folder: Path, nbytes: int = SAMPLE) -> float:
    """Bytes/s of writing a file in `folder` and syncing it; nothing of it stays. Raises StunError where that cannot be."""
    content = os.urandom(min(_CHUNK, nbytes))
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as handle:
            written, start = 0, time.perf_counter()
            while written < nbytes:
                written += handle.write(content)
            os.fsync(handle.fileno())
            return written / (time.perf_counter() - start)
    except OSError as error:
        raise StunError(f"{folder}: cannot be written: {error}") from error


def product_speed(workers: Workers, dtype: torch.dtype, rows: int, width: int, device: str | torch.device = "cpu") -> float:
    """FLOP/s of products [rows, width] x [width, width] made as an expert's are, two for each worker."""
    rows_nD = torch.ones(rows, width, dtype=dtype, device=device)
    weights = [torch.ones(width, width, dtype=dtype, device=device) for _ in range(2 * workers.count)]
    seconds = best(lambda: workers.map(lambda weight_OD: linear(rows_nD, weight_OD), weights), device)
    return len(weights) * 2 * rows * width**2 / seconds
