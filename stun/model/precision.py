"""What layers are computed in."""

from __future__ import annotations

import torch

from stun.config import Precision, StunError
from stun.model.architecture import Architecture
from stun.runtime.cpu import multiplies_bfloat16
from stun.runtime.ranks import Ranks


def compute_dtype(arch: Architecture, device: torch.device) -> torch.dtype:
    """The dtype the checkpoint is stored in, where the device multiplies it fast and the job does not ask for float32."""
    is_fast = device.type != "cpu" or (arch.dtype is torch.bfloat16 and multiplies_bfloat16())
    return arch.dtype if is_fast and arch.precision is Precision.auto else torch.float32


def check_alike(arch: Architecture, ranks: Ranks) -> None:
    """Raises StunError, on all ranks, where some of their CPUs would compute in another dtype than others."""
    found = sorted(set(ranks.gather_objects(str(compute_dtype(arch, ranks.device)))))
    if len(found) > 1:
        error = StunError(f"the ranks' CPUs compute in {', '.join(found)}; give precision=float32")
        error.is_shared = True
        raise error
