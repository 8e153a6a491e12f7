"""CPU features: its type, and whether bfloat16 is multiplied fast."""

import re
from functools import cache
from pathlib import Path

import torch


@cache
def multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are faster than float32: 4 to 7 times with AMX, twice with AVX512_BF16 on AMD. On Intel without
    AMX, AVX512_BF16 is slower than float32."""
    flags = _cpuinfo().get("flags", "").split()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and _vendor() == "AuthenticAMD")


def cpu_type() -> str:
    """Type of the CPU as far as last bits depend on it: vendor, the widest vectors that torch uses, and products of bfloat16."""
    products = f"{'with' if multiplies_bfloat16() else 'without'} fast bfloat16"
    return " ".join(filter(None, ("CPU", _vendor(), torch.backends.cpu.get_cpu_capability(), products)))


def _vendor() -> str:
    return _cpuinfo().get("vendor_id") or _cpuinfo().get("CPU implementer", "")


@cache
def _cpuinfo() -> dict[str, str]:
    file = Path("/proc/cpuinfo")  # on Linux alone
    text = file.read_text() if file.is_file() else ""
    return dict(re.findall(r"^(vendor_id|CPU implementer|flags)\s*:\s*(.*)$", text, re.M))
