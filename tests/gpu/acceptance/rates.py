"""Bytes a second of reading, writing and copying, and sums of the weights of an expert of Arctic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from gpu.acceptance.rows import Row
from stun.benchmark.io import benchmark_io
from stun.config import Device
from stun.preflight.hardware import GIB, best
from stun.run.kurtosis import power_sums
from stun.runtime.ranks import Ranks
from stun.runtime.units import count
from stun.settings.compose import composed
from stun.statistics.accumulators import weight_sums

_PCIE = 64e9 / GIB  # GiB/s of 16 lanes of generation 5, by their specification
_EXPERT = ((9728, 7168), (7168, 4864))
_SMALL = ["shape.hidden=128", "shape.expert_width=64", "shape.experts=4", "threads=[1,2]"]


def check(folder: Path, pretend: bool) -> Iterator[Row]:
    ranks = Ranks(Device.cuda)
    yield from _disk(folder, ranks, pretend)
    nbytes = 2**20 if pretend else GIB
    host_N, device_N = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8, device=ranks.device)
    pinned_N, other_N = host_N.pin_memory(), torch.empty_like(device_N)

    def rate(target_N: torch.Tensor, source_N: torch.Tensor) -> float:
        return nbytes / best(lambda: target_N.copy_(source_N, non_blocking=True), ranks.device) / GIB

    yield Row("copy in, pinned", rate(device_N, pinned_N), "GiB/s", _PCIE, "PCIe 5 x16")
    yield Row("copy out, pinned", rate(pinned_N, device_N), "GiB/s", _PCIE, "PCIe 5 x16")
    yield Row("copy in, pageable", rate(device_N, host_N), "GiB/s")
    inside = 2 * rate(other_N, device_N)
    yield Row("copy on the GPU, read and written", inside, "GiB/s")
    yield from _sums(inside * GIB, ranks, 64 if pretend else 1)


def _disk(folder: Path, ranks: Ranks, pretend: bool) -> Iterator[Row]:
    """`jobs.benchmark case=io`, on half of its experts."""
    cfg = composed("benchmark", ["case=io", f"run_dir={folder}", *(_SMALL if pretend else ["shape.experts=32"])])
    result = benchmark_io(cfg, folder, ranks)
    for threads, rows in result["runs"].items():
        for name, found in rows.items():
            yield Row(f"{name}, {count(int(threads), 'thread')}", found["rate"] / GIB, "GiB/s", found["bare"] / GIB, "bare loop")
    for name, found in result["dd"].items():
        yield Row(f"{name}, dd", found / GIB, "GiB/s")


def _sums(rate: float, ranks: Ranks, divisor: int) -> Iterator[Row]:
    """Milliseconds of the sums of an expert, beside reading it from the GPU's memory."""
    expert = [torch.ones(rows // divisor, columns, dtype=torch.bfloat16, device=ranks.device) for rows, columns in _EXPERT]
    limit = sum(weight_OD.nbytes for weight_OD in expert) / rate
    for name, sums in (("weight sums", weight_sums), ("power sums", power_sums)):
        yield Row(f"{name} of an expert", 1000 * best(lambda sums=sums: sums(expert), ranks.device), "ms", 1000 * limit, "limit")
