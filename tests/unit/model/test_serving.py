"""What is said about loading follows from the family, the counts and the form."""

from __future__ import annotations

import pytest

from stun.model.families import TESTED
from stun.model.runtimes import LEFT_VLLM, runtimes


def test_even_counts():
    uniform = runtimes("qwen3_moe", [0, 102, 102])
    assert uniform["transformers"] == "yes, its own class" and uniform["vLLM"].startswith("yes: general router kernels")
    assert "over 2, 3, 6, 17, 34, 51 ranks" in uniform["vLLM"]
    for count in (64, 352):
        assert ": fused router kernels" in runtimes("qwen3_moe", [count, count])["vLLM"]
    assert runtimes("qwen3_moe", [17, 17])["vLLM"].endswith("expert parallel evenly over 17 ranks, unevenly over any")
    grouped = runtimes("deepseek_v3", [102, 102], is_grouped=True)
    assert "kernels" not in grouped["vLLM"], "routers with groups have a kernel of their own"
    assert "import stun" in runtimes("arctic", [8, 8])["transformers"]


def test_families_that_left_vllm():
    assert LEFT_VLLM.keys() <= set(TESTED)
    assert runtimes("arctic", [8, 8])["vLLM"].startswith("0.28 and earlier: ")
    dots = runtimes("dots1", [8, 8])["vLLM"]
    assert dots.startswith("through its transformers backend, its own class until 0.23: ")


@pytest.mark.parametrize("family", sorted(TESTED))
def test_uneven_counts(family):
    uneven = runtimes(family, [6, 5])
    assert uneven["this package"] == "yes" and uneven["llama.cpp"].startswith("no")
    if family == "arctic":
        assert uneven["transformers"].startswith("after `import stun` only") and uneven["vLLM"].startswith("no")
    else:
        assert all("with trust_remote_code" in uneven[runtime] for runtime in ("transformers", "vLLM"))


def test_novices():
    novices = runtimes("mixtral", [6, 5], has_novices=True)
    assert novices["vLLM"].startswith("0.33 and later") and novices["transformers"].startswith("after `import stun` only")
