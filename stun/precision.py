"""What layers are computed in."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch

from stun.arch import Architecture
from stun.config import Precision, StunError
from stun.ranks import Ranks


@cache
def multiplies_tiles() -> bool:
    """Whether this CPU has instructions for whole tiles of bfloat16 (AMX). Without them products in it are slower than in
    float32, those of pairs (AVX512_BF16) included; with them four to seven times as fast."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return bool(flags) and "amx_bf16" in flags[1].split()


def compute_dtype(arch: Architecture, device: torch.device) -> torch.dtype:
    """The dtype the checkpoint is stored in, where the device multiplies it fast and the job does not ask for float32."""
    is_fast = device.type != "cpu" or (arch.dtype is torch.bfloat16 and multiplies_tiles())
    return arch.dtype if is_fast and arch.precision is Precision.auto else torch.float32


def check_alike(arch: Architecture, ranks: Ranks) -> None:
    """Raises StunError, on all ranks, where some of their CPUs would compute in another dtype than others."""
    found = sorted(set(ranks.gather_objects(str(compute_dtype(arch, ranks.device)))))
    if len(found) > 1:
        error = StunError(f"the ranks' CPUs compute in {', '.join(found)}; give precision=float32")
        error.is_shared = True
        raise error
