"""What is said about loading follows from the counts."""

from __future__ import annotations

from stun.model.runtimes import runtimes


def test_runtimes():
    uniform = runtimes("qwen3_moe", [0, 102, 102])
    assert uniform["transformers"].startswith("yes") and "general router kernels" in uniform["vLLM"]
    assert "over 2, 3, 6, 17, 34, 51 ranks" in uniform["vLLM"]
    assert ": fused router kernels" in runtimes("qwen3_moe", [64, 64])["vLLM"]
    assert "import stun" in runtimes("arctic", [8, 8])["transformers"]
    uneven = runtimes("mixtral", [6, 5])
    assert uneven["vLLM"].startswith("no") and uneven["this package"].startswith("yes")
    assert uneven["transformers"].startswith("after `import stun` only"), "as tests of such checkpoints load them"
