"""Compute dtype of the layers."""

import torch

from stun.config import Precision, StunError
from stun.model.architecture import Architecture
from stun.runtime.cpu import multiplies_bfloat16
from stun.runtime.ranks import Ranks


def compute_dtype(arch: Architecture, device: torch.device) -> torch.dtype:
    """Stored dtype of the checkpoint if the device is fast in it, otherwise, or with precision=float32, float32."""
    is_fast = device.type != "cpu" or (arch.dtype is torch.bfloat16 and multiplies_bfloat16())
    return arch.dtype if is_fast and arch.precision is Precision.auto else torch.float32


def check_alike(arch: Architecture, ranks: Ranks) -> None:
    """Raise StunError, on all ranks, if they would compute in different dtypes."""
    dtypes = sorted(set(ranks.gather_objects(str(compute_dtype(arch, ranks.device)))))
    if len(dtypes) > 1:
        error = StunError(f"the ranks' CPUs compute in {', '.join(dtypes)}; set precision=float32")
        error.is_shared = True
        raise error
