"""The table of families in docs/models.md, from what the tests run: -m helpers.models_table prints it."""

from __future__ import annotations

from helpers.more_families import MORE, REFUSED, SUPPORTED, UNLISTED
from helpers.zoo import FAMILIES

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


def table() -> str:
    """The families, one a line, and the refused ones."""
    lines = ["| `model_type` | models | beyond the usual |", "|---|---|---|"]
    for family in sorted([*FAMILIES, *SUPPORTED]):
        notes = [NOTES[family]] if family in NOTES else []
        notes += [GROUPED] if family in IN_GROUPS else []
        notes += ["the text model is pruned, other towers are copied"] if family in WRAPPERS else []
        notes += ["in no list: by the self-check"] if family in UNLISTED else []
        lines.append(f"| `{family}` | {KNOWN.get(family, '')} | {'; '.join(notes)} |")
    refused = ", ".join(f"`{family}`" for family in sorted(REFUSED))
    return "\n".join([*lines, "", f"Refused by name, with the reason: {refused}, `dbrx`.", ""])


if __name__ == "__main__":
    print(table())
