"""Which runtimes load a pruned checkpoint, from its expert counts alone. Nothing is started; vLLM's limits are those it
documents."""

from __future__ import annotations

# Expert counts that vLLM's fused router kernels are compiled for; a router without another path refuses the rest
# (vllm-project/vllm issue 51521, pull request 50982).
VLLM_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576)
ONLY_HERE = ("arctic",)  # families that transformers itself does not have


def nearest_counts(experts: int) -> list[int]:
    """The largest count in `VLLM_COUNTS` up to `experts`, and the smallest from it on: one where they are the same."""
    below, above = [n for n in VLLM_COUNTS if n <= experts], [n for n in VLLM_COUNTS if n >= experts]
    return sorted({*below[-1:], *above[:1]})


def warning(experts: int, kept: int) -> str:
    """What to know before every layer is left with `kept` of `experts` experts; empty where there is nothing to say."""
    if kept == experts or kept in VLLM_COUNTS:
        return ""
    near = " or ".join(map(str, nearest_counts(kept)))
    return f"{kept} experts a layer: vLLM's fused router kernels are not compiled for that count; the nearest they are: {near}"


def runtimes(model_type: str, counts: list[int]) -> dict[str, str]:
    """Runtime -> what it makes of a checkpoint of this family with `counts` experts per layer (0: none)."""
    distinct, only_here = {count for count in counts if count}, model_type in ONLY_HERE
    after_import = "after `import stun` only: it has no such family"
    if len(distinct) > 1:
        refused = "no: layers keep different numbers of experts; experts.budget=uniform makes one that loads"
        return {"this package": "yes", "transformers": after_import if only_here else refused, "vLLM": refused}
    (experts,) = distinct
    sizes = [n for n in range(2, min(experts, 64) + 1) if experts % n == 0]
    parallel = f"expert parallel over {', '.join(map(str, sizes))} ranks" if sizes else "no expert parallelism"
    kernels = (
        "fused router kernels" if experts in VLLM_COUNTS else f"no fused router kernel for {experts} experts (slower, or refused)"
    )
    return {
        "this package": "yes",
        "transformers": after_import if only_here else "yes, its own class",
        "vLLM": f"where it has the family: {kernels}; {parallel}",
    }
