"""Runtimes that load a pruned checkpoint, judged by its expert counts and vLLM's documented limits; none is started."""

# Expert counts that vLLM's fused router kernels are compiled for; a router without another path refuses the rest
# (vllm-project/vllm issue 51521, pull request 50982).
VLLM_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576)
ONLY_HERE = ("arctic",)  # families that transformers itself does not have


def nearest_counts(experts: int) -> list[int]:
    """Neighbours of `experts` in `VLLM_COUNTS`, below and above; only itself if it is one of them."""
    below, above = [n for n in VLLM_COUNTS if n <= experts], [n for n in VLLM_COUNTS if n >= experts]
    return sorted({*below[-1:], *above[:1]})


def warning(experts: int, kept: int) -> str:
    """Warning before every layer is pruned to `kept` of `experts` experts; empty if there is none."""
    if kept == experts or kept in VLLM_COUNTS:
        return ""
    near = " or ".join(map(str, nearest_counts(kept)))
    return f"{kept} experts a layer: vLLM's fused router kernels are not compiled for that count; the nearest they are: {near}"


def runtimes(model_type: str, counts: list[int]) -> dict[str, str]:
    """Runtime -> how it loads a checkpoint of this family with `counts` experts per layer (0: none)."""
    distinct, only_here = {count for count in counts if count}, model_type in ONLY_HERE
    after_import = "after `import stun` only, since it has no such family"
    if len(distinct) > 1:
        uneven = "layers keep different numbers of experts; experts.budget=uniform makes one that loads"
        transformers = after_import if only_here else f"after `import stun` only, since {uneven} without"
        return {"this package": "yes", "transformers": transformers, "vLLM": f"no, since {uneven}"}
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


def in_words(answers: dict[str, str]) -> dict[str, str]:
    """What loads a checkpoint, from the result of `runtimes`, as the run's summary, its page and the model card say it."""
    return {f"loads in {runtime}": answer for runtime, answer in answers.items()}
