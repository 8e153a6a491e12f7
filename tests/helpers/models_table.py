"""The table of families in docs/models.md, from what the tests run: -m helpers.models_table prints it."""

from __future__ import annotations

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from helpers.more_families import MORE, REFUSED, SUPPORTED, UNLISTED
from helpers.zoo import FAMILIES
from stun.model.runtimes import LEFT_VLLM, VLLM_CLASSES

# family -> models that people know
KNOWN = {
    "afmoe": "Trinity",
    "arctic": "Snowflake Arctic",
    "aria": "Aria",
    "bailing_hybrid": "Ling and Ring, hybrid",
    "cohere2_moe": "Command, MoE",
    "deepseek_ocr2": "DeepSeek-OCR 2",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3, R1; Kimi-K2 (`kimi_k2`)",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v4": "DeepSeek-V4",
    "dots1": "dots.llm1",
    "ernie4_5_moe": "ERNIE 4.5",
    "exaone_moe": "K-EXAONE",
    "flex_olmo": "FlexOlmo",
    "gemma4": "Gemma 4, MoE",
    "glm4_moe": "GLM-4.5 to 4.7",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm4v_moe": "GLM-4.5V, GLM-4.6V",
    "glm_moe_dsa": "GLM-5, 5.1, 5.2",
    "gpt_oss": "gpt-oss",
    "granitemoe": "Granite 3 MoE",
    "granitemoehybrid": "Granite 4",
    "hunyuan_v1_moe": "Hunyuan-A13B",
    "jamba": "Jamba",
    "kimi_k25": "Kimi-K2.5",
    "kimi_linear": "Kimi-Linear",
    "lfm2_moe": "LFM2-MoE",
    "mimo_v2_flash": "MiMo-V2-Flash",
    "minimax": "MiniMax-Text-01, MiniMax-M1",
    "minimax_m2": "MiniMax-M2",
    "minimax_m3_vl": "MiniMax-M3",
    "mistral3": "Mistral with vision around mistral4",
    "mixtral": "Mixtral",
    "nemotron_h": "Nemotron-3",
    "olmoe": "OLMoE",
    "phimoe": "Phi-3.5-MoE",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen3_5_moe": "Qwen3.5",
    "qwen3_5_moe_text": "the text model of Qwen3.5",
    "qwen3_moe": "Qwen3",
    "qwen3_next": "Qwen3-Next",
    "qwen3_omni_moe": "Qwen3-Omni",
    "qwen3_vl_moe": "Qwen3-VL",
}
# family -> forms in which released checkpoints of it are stored, beside bfloat16, as far as they were seen
STORED = {
    "deepseek_v3": "fp8 in blocks; NVFP4; int4 (Kimi-K2)",
    "deepseek_v32": "fp8 in blocks",
    "deepseek_v4": "fp8 in blocks, experts in MXFP4",
    "glm4_moe": "fp8 by channel",
    "glm_moe_dsa": "fp8 in blocks",
    "gpt_oss": "MXFP4",
    "kimi_k25": "int4",
    "minimax_m2": "fp8 in blocks",
    "mixtral": "GPTQ, AWQ",
    "qwen3_moe": "fp8 in blocks; GPTQ, AWQ",
}
# family -> class that its released checkpoints name, where transformers writes another
ON_THE_HUB = {
    "arctic": "ArcticForCausalLM",
    "deepseek_ocr2": "DeepseekOCR2ForCausalLM",
    "kimi_k25": "KimiK25ForConditionalGeneration",
    "phimoe": "PhiMoEForCausalLM",
    "unlimited_ocr": "UnlimitedOCRForCausalLM",
}
# family -> what is beyond the usual
NOTES = {
    "arctic": "implemented here; transformers has none",
    "bailing_hybrid": "convolutions that are stored in parts are kept whole",
    "deepseek_v4": "hash-routed layers: the survivor with the nearest router row takes a removed expert's tokens",
    "gemma4": "experts beside the MLP",
    "glm_moe_dsa": "chosen tokens are carried from layer to layer",
    "gpt_oss": "MXFP4 is read and, where whole experts alone are removed, kept",
    "hy_v4": "chosen tokens are carried from layer to layer",
    "jamba": "Mamba projections count as attention",
    "kimi_linear": "convolutions that are stored in parts are kept whole",
    "lfm2_moe": "convolution projections count as attention",
    "mistral_large4": "keys and values are shared between layers",
    "nemotron_h": "experts without a gate, between latent projections",
}
GROUPED = "every routing group keeps the same number of experts"
IN_GROUPS = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "exaone_moe", "glm4_moe", "kimi_k25", "mimo_v2_flash")
WRAPPERS = [family for family, content in MORE.items() if "text_config" in content or "thinker_config" in content]


def class_of(family: str) -> str:
    """The class that transformers writes into config.json of a model of this family."""
    whole = (MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) if family in WRAPPERS else ()
    for mapping in (*whole, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if family in mapping:
            return mapping[family] if isinstance(mapping[family], str) else mapping[family][0]
    return ""


def in_vllm(family: str) -> str:
    """Whether vLLM 0.33 has a class of the name that checkpoints of this family have."""
    name = ON_THE_HUB.get(family, class_of(family))
    if name in VLLM_CLASSES:
        return "own class"
    return f"own class until {LEFT_VLLM[name]}" if name in LEFT_VLLM else "transformers backend"


def table() -> str:
    """The families, one a line, and the refused ones."""
    lines = ["| `model_type` | models | stored, beside bfloat16 | vLLM 0.33 | beyond the usual |", "|---|---|---|---|---|"]
    for family in sorted([*FAMILIES, *SUPPORTED]):
        notes = [NOTES[family]] if family in NOTES else []
        notes += [GROUPED] if family in IN_GROUPS else []
        notes += ["the text model is pruned, other towers are copied"] if family in WRAPPERS else []
        notes += ["in no list: by the self-check"] if family in UNLISTED else []
        cells = (f"`{family}`", KNOWN.get(family, ""), STORED.get(family, ""), in_vllm(family), "; ".join(notes))
        lines.append(f"| {' | '.join(cells)} |")
    refused = ", ".join(f"`{family}`" for family in sorted(REFUSED))
    return "\n".join([*lines, "", f"Refused by name, with the reason: {refused}, `dbrx`.", ""])


if __name__ == "__main__":
    print(table())
