"""What this machine's CPU can do, and what numpy is told about it."""

from __future__ import annotations

import os
import re
import sys
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path

_WIDE = "X86_V4 AVX512_SKX"  # 512-bit vectors, as numpy's versions call them


@cache
def _described() -> dict[str, str]:
    """Vendor and features, as Linux names them; empty where it does not say."""
    file = Path("/proc/cpuinfo")
    return dict(re.findall(r"^(vendor_id|flags)\s*:\s*(.*)$", file.read_text() if file.is_file() else "", re.M))


def is_amd() -> bool:
    return _described().get("vendor_id") == "AuthenticAMD"


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 is multiplied faster than float32: four to seven times as fast with instructions for whole tiles (AMX),
    twice as fast with those for pairs (AVX512_BF16) on AMD's CPUs. On Intel's without tiles pairs are slower."""
    flags = _described().get("flags", "").split()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and is_amd())


def start_numpy() -> None:
    """Import numpy without 512-bit vectors on AMD's CPUs: on Zen 4, where an instruction that it selects with is slow, the
    smallest of a row of 1,024 take 5 ns a number with them and 1 ns without. Before version 2 it knows no others. What its user
    has settled stays."""
    is_settled = "numpy" in sys.modules or {"NPY_ENABLE_CPU_FEATURES", "NPY_DISABLE_CPU_FEATURES"} & os.environ.keys()
    if not is_amd() or is_settled or version("numpy").startswith("1."):
        return
    os.environ["NPY_DISABLE_CPU_FEATURES"] = _WIDE
    try:
        with warnings.catch_warnings(action="ignore", category=ImportWarning):  # of the name that this version does not have
            import numpy  # noqa: F401
    except RuntimeError as error:
        error.add_note("stun wants this on AMD's CPUs, not where NPY_DISABLE_CPU_FEATURES is set, be it to nothing")
        raise
    finally:
        del os.environ["NPY_DISABLE_CPU_FEATURES"]
