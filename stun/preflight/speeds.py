"""Measured rates of this machine: its disk, and the memory and products of one rank."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from stun.checkpoint.reader import Checkpoint
from stun.config import StunError
from stun.runtime.matmul import linear
from stun.runtime.ranks import Ranks
from stun.runtime.threads import Workers

SAMPLE = 2**28  # bytes read, written or copied to measure a rate
_ROUNDS = 3
_CHUNK = 2**24
_LARGE = {"cpu": (512, 2048), "cuda": (8192, 8192)}  # rows and width of a product that takes the device's peak


def best(work: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Seconds of the fastest round after one to warm up."""
    seconds = []
    for _ in range(1 + _ROUNDS):
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def wait_for(device: str | torch.device) -> None:
    """Wait until a GPU has finished its work; a no-op for CPUs."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def read_speed(source: Checkpoint, nbytes: int = SAMPLE) -> float:
    """Bytes/s of reading the start of the largest shard, or of writing where the shards are still to come. The system is asked to
    drop the shard from its cache first; if it does not, this is the speed of the cache."""
    if not source.is_here:
        return write_speed(source.folder, nbytes)
    file = max({info.file for info in source.tensors.values()}, key=lambda file: file.stat().st_size)
    with file.open("rb", buffering=0) as handle:
        os.posix_fadvise(handle.fileno(), 0, nbytes, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(min(_CHUNK, nbytes, file.stat().st_size))
        read, start = 0, time.perf_counter()
        while read < nbytes and (count := handle.readinto(buffer)):
            read += count
        return read / (time.perf_counter() - start)


def write_speed(folder: Path, nbytes: int = SAMPLE) -> float:
    """Bytes/s of writing and syncing a file in `folder`, which is then removed. Raises StunError if it cannot be written."""
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
    """FLOP/s of products [rows, width] x [width, width], computed like those of an expert, two per worker."""
    rows_nD = torch.ones(rows, width, dtype=dtype, device=device)
    weights = [torch.ones(width, width, dtype=dtype, device=device) for _ in range(2 * workers.count)]
    seconds = best(lambda: workers.map(lambda weight_OD: linear(rows_nD, weight_OD), weights), device)
    return len(weights) * 2 * rows * width**2 / seconds


def measure_rates(source: Checkpoint, folder: Path, ranks: Ranks, dtype: torch.dtype) -> dict[str, float]:
    """Bytes/s to `read` the disk of `source` (without cache), to `write` to that of `folder` (synced), and to `copy` in
    the memory of this rank's device (read and written together); `flops` of a large product in the compute dtype, in FLOP/s."""
    flops = product_speed(ranks.workers, dtype, *_LARGE[ranks.device.type], ranks.device)
    disk = {"read": read_speed(source), "write": write_speed(folder)}
    content = torch.ones(SAMPLE, dtype=torch.uint8, device=ranks.device)
    target = torch.empty_like(content)
    return {**disk, "copy": 2 * SAMPLE / best(lambda: target.copy_(content), ranks.device), "flops": flops}
