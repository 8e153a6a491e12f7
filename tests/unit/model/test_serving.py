"""What is said about loading follows from the counts."""

from __future__ import annotations

from stun.model.runtimes import VLLM_COUNTS, nearest_counts, runtimes, warning


def test_nearest_counts():
    for kept in range(1, 577):
        near = nearest_counts(kept)
        assert near[0] <= kept <= near[-1] and set(near) <= set(VLLM_COUNTS)
        assert not [n for n in VLLM_COUNTS if near[0] < n < near[-1]]
        assert bool(warning(600, kept)) == (kept not in VLLM_COUNTS)
        assert all(str(n) in warning(600, kept) for n in near if kept not in VLLM_COUNTS)


def test_above_the_largest_count():
    assert nearest_counts(600) == [576]


def test_an_untouched_count_needs_no_warning():
    assert warning(60, 60) == ""


def test_runtimes():
    uniform = runtimes("qwen3_moe", [0, 102, 102])
    assert uniform["transformers"].startswith("yes") and "for 102 experts" in uniform["vLLM"]
    assert "over 2, 3, 6, 17, 34, 51 ranks" in uniform["vLLM"]
    assert "no fused" not in runtimes("qwen3_moe", [64, 64])["vLLM"]
    assert "import stun" in runtimes("arctic", [8, 8])["transformers"]
    uneven = runtimes("mixtral", [6, 5])
    assert uneven["vLLM"].startswith("no") and uneven["this package"].startswith("yes")
    assert uneven["transformers"].startswith("after `import stun` only"), "as tests of such checkpoints load them"
