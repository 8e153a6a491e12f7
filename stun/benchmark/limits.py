"""Measured peak rates of the hardware, to compare phases with."""

from dataclasses import dataclass
from pathlib import Path

import torch

from stun.checkpoint.reader import Checkpoint
from stun.preflight.speeds import SAMPLE, best, product_speed, read_speed, wait_for, write_speed
from stun.runtime.ranks import Ranks
from stun.runtime.timers import Meter

_LARGE = {"cpu": (512, 2048), "cuda": (8192, 8192)}  # rows and width of a product


@dataclass(frozen=True)
class Rates:
    """Bytes/s of disk reads (without cache) and synced disk writes; bytes/s, read and written together, of a copy in the device's
    memory; FLOP/s of a large product in the compute dtype."""

    read: float
    write: float
    copy: float
    flops: float


def measure_rates(source: Checkpoint, folder: Path, ranks: Ranks, dtype: torch.dtype) -> Rates:
    """Rates of reading `source`, of writing to `folder`, and of this rank's device (the best of a few rounds)."""
    device, large = ranks.device, _LARGE[ranks.device.type]
    flops = product_speed(ranks.workers, dtype, *large, device)
    return Rates(read_speed(source), write_speed(folder), copy_speed(device), flops)


def copy_speed(device: torch.device) -> float:
    """Bytes/s, read and written together, of a copy in the device's memory."""
    source = torch.ones(SAMPLE, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * SAMPLE / best(lambda: target.copy_(source), device)


class DeviceMeter(Meter):
    """Meter that waits for the device at the end of every phase."""

    def __init__(self, device: torch.device):
        self.device = device
        super().__init__()

    def enter(self, phase: str) -> None:
        wait_for(self.device)
        super().enter(phase)
