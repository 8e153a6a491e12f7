"""Runtimes that load a pruned checkpoint, judged by its expert counts and vLLM's documented limits; none is started."""

# Expert counts that vLLM's fused router kernels are compiled for (version 0.33); for others it takes its general kernels.
VLLM_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576)
ONLY_HERE = ("arctic",)  # families that transformers itself does not have


def runtimes(model_type: str, counts: list[int], has_novices: bool = False) -> dict[str, str]:
    """Runtime -> how it loads a checkpoint of this family with `counts` experts per layer (0: none), beside novices or none."""
    distinct, only_here = {count for count in counts if count}, model_type in ONLY_HERE
    after_import = "after `import stun` only, since it has no such family"
    if has_novices:
        transformers = "after `import stun` only; without, it would fill the missing experts with random weights"
        return {
            "this package": "yes",
            "transformers": after_import if only_here else transformers,
            "vLLM": "0.33 and later, where it has the family: constants in place of experts; tensor and pipeline parallel only",
        }
    if len(distinct) > 1:
        uneven = "layers keep different numbers of experts; experts.budget=uniform makes one that loads"
        transformers = after_import if only_here else f"after `import stun` only, since {uneven} without"
        return {"this package": "yes", "transformers": transformers, "vLLM": f"no, since {uneven}"}
    (experts,) = distinct
    sizes = [n for n in range(2, min(experts, 64) + 1) if experts % n == 0]
    parallel = f"expert parallel over {', '.join(map(str, sizes))} ranks" if sizes else "no expert parallelism"
    kernels = "fused router kernels" if experts in VLLM_COUNTS else "general router kernels, a little slower than the fused ones"
    return {
        "this package": "yes",
        "transformers": after_import if only_here else "yes, its own class",
        "vLLM": f"where it has the family: {kernels}; {parallel}",
    }


def in_words(answers: dict[str, str]) -> dict[str, str]:
    """What loads a checkpoint, from the result of `runtimes`, as the run's summary, its page and the model card say it."""
    return {f"loads in {runtime}": answer for runtime, answer in answers.items()}
