"""Runtimes that load a pruned checkpoint, from its family and expert counts; none is started (stun.serving does that).

What is said of vLLM is of version 0.33, from its registry of models and its routers; docs/serving.md lists what was served.
"""

from stun.schema import COUNT, TEXT

# Expert counts that vLLM's fused top-k kernels are compiled for (the instances of `topkGating` in the CUDA wheel); for all others
# they fall back to two general ones. Routers with groups have a kernel of their own.
VLLM_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 352, 384, 448, 512, 576)
# Classes of MoE models in vLLM's registry, as `architectures` in config.json names them; all others run through its transformers
# backend, where that takes them.
VLLM_CLASSES = (
    *("AfmoeForCausalLM", "AriaForConditionalGeneration", "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM"),
    *("BailingMoeV2_5ForCausalLM", "BailingMoeV3ForCausalLM", "Cohere2MoeForCausalLM", "DeepseekOCR2ForCausalLM"),
    *("DeepseekOCRForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM"),
    *("DeepseekV4ForCausalLM", "Dots3NoteForCausalLM", "Ernie4_5_MoeForCausalLM", "ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM"),
    *("Gemma4ForConditionalGeneration", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "Glm4vMoeForConditionalGeneration"),
    *("Glm5NextForConditionalGeneration", "GlmMoeDsaForCausalLM", "GptOssForCausalLM", "GraniteMoeForCausalLM"),
    *("GraniteMoeHybridForCausalLM", "GraniteMoeSWAForCausalLM", "GraniteMoeSharedForCausalLM", "HYV3ForCausalLM"),
    *("HYV4ForCausalLM", "JambaForCausalLM", "KimiK25ForConditionalGeneration", "KimiLinearForCausalLM", "LagunaForCausalLM"),
    *("Lfm2MoeForCausalLM", "MiMoV2FlashForCausalLM", "MiniMaxM2ForCausalLM", "MiniMaxM3SparseForConditionalGeneration"),
    *("Mistral3ForConditionalGeneration", "MistralLarge3ForCausalLM", "MixtralForCausalLM", "NemotronHForCausalLM"),
    *("OlmoeForCausalLM", "PhiMoEForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM"),
    *("Qwen3OmniMoeForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    *("Qwen3_5MoeForConditionalGeneration", "UnlimitedOCRForCausalLM"),
)
# Last version with the class (`_PREVIOUSLY_SUPPORTED_MODELS` there); later ones run what transformers has.
LEFT_VLLM = {"ArcticForCausalLM": "0.28", "Dots1ForCausalLM": "0.23", "MiniMaxForCausalLM": "0.23"}
SERVED = "served.json"  # results of stun.serving in the folder of the run
SERVED_RESULTS = {"runtimes?": {TEXT: {"versions": {TEXT: TEXT}, "prompts": COUNT, "tokens": COUNT, "equal": COUNT}}}
ONLY_HERE = ("ArcticForCausalLM",)  # classes that transformers itself does not have
# Classes of which a result was converted and run: docs/serving.md.
GGUF = (
    *("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM", "GptOssForCausalLM", "GraniteMoeForCausalLM", "MixtralForCausalLM"),
    *("OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"),
)
_AFTER_IMPORT = "after `import stun` only, since it has no such family"


def runtimes(architecture: str, counts: list[int], has_novices: bool = False, is_grouped: bool = False) -> dict[str, str]:
    """Runtime -> how it loads a checkpoint of this class with `counts` experts per layer (0: none), beside novices or none;
    `is_grouped`: its routers know groups of experts."""
    distinct = {count for count in counts if count}
    if has_novices:
        return _novices(architecture)
    if len(distinct) > 1:
        return uneven(architecture)
    transformers = _AFTER_IMPORT if architecture in ONLY_HERE else "yes, its own class"
    gguf = "converted by its own script" if architecture in GGUF else "not tried with this family"
    vllm = _vllm(architecture, *distinct, is_grouped)
    return {"this package": "yes", "transformers": transformers, "vLLM": vllm, "llama.cpp": gguf}


def uneven(architecture: str) -> dict[str, str]:
    """The same for a checkpoint whose layers keep different numbers of experts, with the code beside it."""
    if architecture in ONLY_HERE:
        way = "no, since layers keep different numbers of experts; experts.budget=uniform makes one that loads"
        return {"this package": "yes", "transformers": _AFTER_IMPORT, "vLLM": way, "llama.cpp": way}
    trust = "with trust_remote_code, since layers keep different numbers of experts"
    gguf = "no; experts.uneven=padded makes one that it loads, where the router has a bias"
    return {
        "this package": "yes",
        "transformers": f"yes, {trust}",
        "vLLM": f"{trust}, through its transformers backend; tried with tiny models of seven families",
        "llama.cpp": gguf,
    }


def _novices(architecture: str) -> dict[str, str]:
    transformers = "after `import stun` only; without, it would fill the missing experts with random weights"
    return {
        "this package": "yes",
        "transformers": _AFTER_IMPORT if architecture in ONLY_HERE else transformers,
        "vLLM": "0.33 and later, where it has the family: constants in place of experts; tensor and pipeline parallel only",
        "llama.cpp": "no, it has no constants in place of experts",
    }


def _vllm(architecture: str, experts: int, is_grouped: bool) -> str:
    sizes = [n for n in range(2, min(experts, 64) + 1) if experts % n == 0]
    evenly = f"evenly over {', '.join(map(str, sizes))} ranks, " if sizes else ""
    parallel = f"expert parallel {evenly}unevenly over any"
    fused = "fused router kernels" if experts in VLLM_COUNTS else "general router kernels, a little slower than the fused ones"
    return f"{vllm_class(architecture)}: {'' if is_grouped else f'{fused}; '}{parallel}"


def vllm_class(architecture: str) -> str:
    """Whether vLLM has this class, and if not what it does."""
    if architecture in VLLM_CLASSES:
        return "yes"
    last = LEFT_VLLM.get(architecture, "")
    if last and architecture in ONLY_HERE:
        return f"{last} and earlier"
    return f"through its transformers backend, where that takes it{f'; its own class until {last}' if last else ''}"


def in_words(answers: dict[str, str]) -> dict[str, str]:
    """What loads a checkpoint, from the result of `runtimes`, as the run's summary, its page and the model card say it."""
    return {f"loads in {runtime}": answer for runtime, answer in answers.items()}


def served_in_words(content: dict) -> dict[str, str]:
    """What runtimes were started on a checkpoint and generated, from the content of `SERVED`."""
    words = {}
    for runtime, served in content.get("runtimes", {}).items():
        equal, prompts, tokens = (served[key] for key in ("equal", "prompts", "tokens"))
        words[f"served by {runtime} {served['versions'].get(runtime, '')}"] = (
            f"{equal} of {prompts} prompts continued by the same {tokens} tokens as here"
        )
    return words
