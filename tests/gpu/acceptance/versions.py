"""Card, driver and versions of what is installed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import stun
from gpu.acceptance.rows import Row
from stun.preflight.hardware import GIB, disk_free, host_memory

_PACKAGES = ("torch", "triton", "transformers", "datasets", "hydra-core", "safetensors", "numpy", "deepspeed", "pytest")
_QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm", "--format=csv,noheader"]


def check(folder: Path, pretend: bool) -> Iterator[Row]:
    card = torch.cuda.get_device_properties(0)
    yield Row("card", f"{card.name}, {card.multi_processor_count} multiprocessors, capability {card.major}.{card.minor}")
    yield Row("memory", card.total_memory / GIB, "GiB")
    if shutil.which("nvidia-smi"):
        yield Row("nvidia-smi", subprocess.run(_QUERY, capture_output=True, text=True, timeout=20).stdout.strip())
    yield Row("CUDA of torch", str(torch.version.cuda))
    yield Row("stun, python", f"{stun.__version__}, {platform.python_version()}")
    for package in _PACKAGES:
        yield Row(package, _version(package))
    yield Row("host", f"{len(os.sched_getaffinity(0))} cores, {host_memory(1) / GIB:.0f} GiB")
    yield Row("disk", disk_free(str(folder)) / GIB, "GiB")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
