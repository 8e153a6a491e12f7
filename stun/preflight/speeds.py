"""What this machine does a second, measured: its disk, and the arithmetic of one rank, as the streams use them.

What is predicted from is the usual speed, with whatever else the machine does; what phases stand beside is the best.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from stun.checkpoint.reader import Checkpoint
from stun.config import StunError
from stun.runtime.matmul import linear
from stun.runtime.threads import Workers

SAMPLE = 2**28  # bytes read, written or copied to measure a rate
_ROUNDS, _SECONDS = 3, 0.1
_CHUNK = 2**24
_HEADS, _WIDTH = 8, 64  # of the attention that is timed
_ENTRIES = 2**21  # of the tensor on which a norm is timed


@dataclass(frozen=True)
class Speeds:
    """Of one rank: FLOP/s of the experts' products and of attention, and bytes/s that the operations between them write."""

    products: float
    attention: float
    between: float


def usual(work: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Seconds of a round, after one to warm up: the mean over a tenth of a second and at least two."""
    work()
    wait_for(device)
    rounds, start = 0, time.perf_counter()
    while rounds < 2 or time.perf_counter() - start < _SECONDS:
        work()
        wait_for(device)
        rounds += 1
    return (time.perf_counter() - start) / rounds


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


def rank_speeds(workers: Workers, dtype: torch.dtype, rows: int, width: int, length: int) -> Speeds:
    """Those of this rank's CPU in `dtype`: products of so many rows of `width`, attention in samples of `length`."""
    products = product_speed(workers, dtype, rows, width, timed=usual)
    return Speeds(products, attention_speed(dtype, length), norm_speed(dtype, width))


def slowest(ranks: list[Speeds]) -> Speeds:
    """Of each kind: all wait for the slowest rank."""
    return Speeds(*map(min, zip(*map(astuple, ranks), strict=True)))


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


def copy_speed(device: torch.device) -> float:
    """Bytes/s that a copy within the device's memory reads and writes together."""
    source = torch.ones(SAMPLE, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * SAMPLE / best(lambda: target.copy_(source), device)


def product_speed(
    workers: Workers, dtype: torch.dtype, rows: int, width: int, device: str | torch.device = "cpu", timed: Callable = best
) -> float:
    """FLOP/s of products [rows, width] x [width, width] made as an expert's are, two for each worker; the best, or as `timed`
    says."""
    rows_nD = torch.ones(rows, width, dtype=dtype, device=device)
    weights = [torch.ones(width, width, dtype=dtype, device=device) for _ in range(2 * workers.count)]
    seconds = timed(lambda: workers.map(lambda weight_OD: linear(rows_nD, weight_OD), weights), device)
    return len(weights) * 2 * rows * width**2 / seconds


def attention_speed(dtype: torch.dtype, length: int) -> float:
    """FLOP/s of causal attention in a sample of `length`, of which half of the scores count."""
    heads_BHTD = torch.ones(1, _HEADS, length, _WIDTH, dtype=dtype)
    seconds = usual(lambda: F.scaled_dot_product_attention(heads_BHTD, heads_BHTD, heads_BHTD, is_causal=True))
    return 2 * _HEADS * length**2 * _WIDTH / seconds


def norm_speed(dtype: torch.dtype, width: int) -> float:
    """Bytes/s that a layer's norm writes, which stands for what lies between products."""
    rows_TD = torch.ones(max(1, _ENTRIES // width), width, dtype=dtype)
    weight_D = rows_TD[0]

    def norm() -> torch.Tensor:
        wide_TD = rows_TD.float()
        scale_T = wide_TD.pow(2).mean(-1, keepdim=True).rsqrt()
        return weight_D * (wide_TD * scale_T).to(dtype)

    written = rows_TD.numel() * (2 * 4 + 2 * dtype.itemsize + (0 if dtype is torch.float32 else 4))
    return written / usual(norm)
