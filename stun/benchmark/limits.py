"""What this machine does a second at most, measured: the limits that phases stand beside."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from stun.checkpoint import Checkpoint
from stun.hardware import read_speed
from stun.meter import Meter

SAMPLE = 2**28  # bytes read, written or copied to measure a rate
_ROUNDS = 3


@dataclass(frozen=True)
class Rates:
    """Bytes/s that the disk reads (its cache emptied) and writes (synced); bytes/s that a copy within the device's memory reads
    and writes together; FLOP/s of a large product in the dtype that layers compute in."""

    read: float
    write: float
    copy: float
    flops: float


def measure_rates(source: Checkpoint, folder: Path, device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of the disk that `source` is on, and `folder`; of `device`, the best of a few rounds."""
    return Rates(read_speed(source, SAMPLE), _write_speed(folder), _copy_speed(device), _product_speed(device, dtype))


def wait_for(device: torch.device) -> None:
    """Return once a GPU has done what it was given; a CPU has by then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class DeviceMeter(Meter):
    """A meter whose phases end when the device is done with them."""

    def __init__(self, device: torch.device):
        self.device = device
        super().__init__()

    def enter(self, phase: str) -> None:
        wait_for(self.device)
        super().enter(phase)


def _write_speed(folder: Path) -> float:
    file, content = folder / "scratch", os.urandom(2**24)
    start = time.perf_counter()
    with file.open("wb", buffering=0) as handle:
        for _ in range(SAMPLE // len(content)):
            handle.write(content)
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - start
    file.unlink()
    return SAMPLE / seconds


def _copy_speed(device: torch.device) -> float:
    source = torch.ones(SAMPLE, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * SAMPLE / _best(lambda: target.copy_(source), device)


def _product_speed(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 2048
    matrix, product = torch.ones(size, size, dtype=dtype, device=device), torch.empty(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _best(lambda: torch.mm(matrix, matrix, out=product), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest round after one to warm up."""
    spent = []
    for _ in range(1 + _ROUNDS):
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        spent.append(time.perf_counter() - start)
    return min(spent[1:])
