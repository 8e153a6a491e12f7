"""CPU features, and the ones numpy may use."""

from __future__ import annotations

import os
import re
import sys
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path

_WIDE = "X86_V4 AVX512_SKX"  # numpy's names for 512-bit vectors, in its newer and older versions


@cache
def _described() -> dict[str, str]:
    """Vendor and features, as Linux names them; empty on other systems."""
    file = Path("/proc/cpuinfo")
    return dict(re.findall(r"^(vendor_id|flags)\s*:\s*(.*)$", file.read_text() if file.is_file() else "", re.M))


def is_amd() -> bool:
    return _described().get("vendor_id") == "AuthenticAMD"


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are faster than float32: 4 to 7 times with AMX, twice with AVX512_BF16 on AMD. On Intel without
    AMX, AVX512_BF16 is slower than float32."""
    flags = _described().get("flags", "").split()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and is_amd())


def start_numpy() -> None:
    """Import numpy without 512-bit vectors on AMD CPUs. On Zen 4 one of their instructions is slow: selecting the smallest of
    1,024 numbers takes 5 ns a number with them, 1 ns without. numpy 1 has no other vectors to fall back on; a setting of the
    user's is not changed."""
    is_settled = "numpy" in sys.modules or {"NPY_ENABLE_CPU_FEATURES", "NPY_DISABLE_CPU_FEATURES"} & os.environ.keys()
    if not is_amd() or is_settled or version("numpy").startswith("1."):
        return
    os.environ["NPY_DISABLE_CPU_FEATURES"] = _WIDE
    try:
        # Each version of numpy warns of the name that only the other versions have.
        with warnings.catch_warnings(action="ignore", category=ImportWarning):
            import numpy  # noqa: F401
    except RuntimeError as error:
        error.add_note("stun sets this on AMD CPUs; set NPY_DISABLE_CPU_FEATURES yourself, even to nothing, and it does not")
        raise
    finally:
        del os.environ["NPY_DISABLE_CPU_FEATURES"]
