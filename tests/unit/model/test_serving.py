"""What is said about loading follows from the family, the counts and the form."""

from __future__ import annotations

import pytest

from stun.model.runtimes import runtimes


def test_even_counts():
    uniform = runtimes("Qwen3MoeForCausalLM", [0, 102, 102])
    assert uniform["transformers"] == "yes, its own class" and uniform["vLLM"].startswith("yes: general router kernels")
    assert "over 2, 3, 6, 17, 34, 51 ranks" in uniform["vLLM"]
    for count in (64, 352):
        assert ": fused router kernels" in runtimes("Qwen3MoeForCausalLM", [count, count])["vLLM"]
    assert runtimes("Qwen3MoeForCausalLM", [17, 17])["vLLM"].endswith("expert parallel evenly over 17 ranks, unevenly over any")
    grouped = runtimes("DeepseekV3ForCausalLM", [102, 102], is_grouped=True)
    assert "kernels" not in grouped["vLLM"], "routers with groups have a kernel of their own"
    assert "import stun" in runtimes("ArcticForCausalLM", [8, 8])["transformers"]


def test_classes_that_vllm_does_not_have():
    assert runtimes("ArcticForCausalLM", [8, 8])["vLLM"].startswith("0.28 and earlier: ")
    dots = runtimes("Dots1ForCausalLM", [8, 8])["vLLM"]
    assert dots.startswith("through its transformers backend, where that takes it; its own class until 0.23: ")
    assert runtimes("NewMoeForCausalLM", [8, 8])["vLLM"].startswith("through its transformers backend, where that takes it: ")


@pytest.mark.parametrize("architecture", ["ArcticForCausalLM", "MixtralForCausalLM", "NewMoeForCausalLM"])
def test_uneven_counts(architecture):
    uneven = runtimes(architecture, [6, 5])
    assert uneven["this package"] == "yes" and uneven["llama.cpp"].startswith("no")
    if architecture == "ArcticForCausalLM":
        assert uneven["transformers"].startswith("after `import stun` only") and uneven["vLLM"].startswith("no")
    else:
        assert all("with trust_remote_code" in uneven[runtime] for runtime in ("transformers", "vLLM"))


def test_novices():
    novices = runtimes("MixtralForCausalLM", [6, 5], has_novices=True)
    assert novices["vLLM"].startswith("0.33 and later") and novices["transformers"].startswith("after `import stun` only")
