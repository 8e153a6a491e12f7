"""Measured peak rates of the hardware, to compare phases with."""

from pathlib import Path

import torch

from stun.checkpoint.reader import Checkpoint
from stun.preflight.speeds import SAMPLE, best, product_speed, read_speed, write_speed
from stun.runtime.ranks import Ranks

_LARGE = {"cpu": (512, 2048), "cuda": (8192, 8192)}  # rows and width of a product


def measure_rates(source: Checkpoint, folder: Path, ranks: Ranks, dtype: torch.dtype) -> dict[str, float]:
    """Bytes/s to `read` the disk of `source` (without cache), to `write` to that of `folder` (synced), and to `copy` in
    the memory of this rank's device (read and written together); `flops` of a large product in the compute dtype, in FLOP/s."""
    flops = product_speed(ranks.workers, dtype, *_LARGE[ranks.device.type], ranks.device)
    disk = {"read": read_speed(source), "write": write_speed(folder)}
    content = torch.ones(SAMPLE, dtype=torch.uint8, device=ranks.device)
    target = torch.empty_like(content)
    return {**disk, "copy": 2 * SAMPLE / best(lambda: target.copy_(content), ranks.device), "flops": flops}
