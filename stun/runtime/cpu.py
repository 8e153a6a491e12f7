"""CPU features: whether bfloat16 is multiplied fast."""

import re
from functools import cache
from pathlib import Path


@cache
def multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are faster than float32: 4 to 7 times with AMX, twice with AVX512_BF16 on AMD. On Intel without
    AMX, AVX512_BF16 is slower than float32."""
    file = Path("/proc/cpuinfo")  # on Linux alone
    found = dict(re.findall(r"^(vendor_id|flags)\s*:\s*(.*)$", file.read_text() if file.is_file() else "", re.M))
    flags = found.get("flags", "").split()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and found.get("vendor_id") == "AuthenticAMD")
