"""Model families: the tested ones, the refused ones, and what of a family its code does not tell.

Everything else is found by building layers of a family and from its configuration (stun.model.routing).
"""

from pathlib import Path

import transformers
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stun.checkpoint.config_check import entries
from stun.config import StunError

HETEROGENEOUS = "stun_"  # prefix of the model type where layers keep different numbers of experts
HETEROGENEOUS_CLASS = "Stun"  # ... and of the class
# Lists, in config.json, each layer's experts that are novices, in the form that vLLM reads (its design/expert_substitution.md).
NOVICES = "approximate_experts"
PADDED = "padded_experts"  # lists, in config.json, each layer's experts of zeros that only fill it up
COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# Model types whose tests run in tests/runs/test_families.py. Any other passes a self-check first (stun.stream.self_check).
TESTED = (
    *("afmoe", "arctic", "aria", "aria_text", "bailing_hybrid", "cohere2_moe", "deepseek_ocr2", "deepseek_v2"),
    *("deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1", "dots3_note", "ernie4_5_moe", "exaone_moe", "gemma4"),
    *("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa", "gpt_oss", "granitemoe"),
    *("granitemoehybrid", "hunyuan_v1_moe", "hy_v3", "hy_v4", "hy_v4_vl", "jamba", "kimi_k25", "kimi_linear"),
    *("laguna", "lfm2_moe", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl", "minimax_m3_vl_text", "mistral3"),
    *("mistral4", "mistral_large4", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe"),
    *("qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl_moe"),
)
# Field for the number of experts where config.json on the hub has another name for it than the family's code.
FIELDS = {"qwen3_moe": "num_experts"}
FLOORS = {"phimoe": 2}  # fewest experts of a layer, where its code does not tell: this router always picks two
# Norms between the experts and the layer's output, in order, where there are any.
NORMS_BEHIND = {
    "afmoe": ("post_mlp_layernorm",),
    "flex_olmo": ("post_feedforward_layernorm",),
    "gemma4": ("post_feedforward_layernorm_2", "post_feedforward_layernorm"),
    "gemma4_text": ("post_feedforward_layernorm_2", "post_feedforward_layernorm"),
}
ALIASES = {"kimi_k2": "deepseek_v3"}  # names that checkpoints have for a family of transformers
REFUSED = {
    "dbrx": "its experts run in the family's own code, where the inputs of single experts cannot be observed",
    "diffusion_gemma": "it generates by denoising blocks of text with a second stack of layers, not by predicting the next token",
    "llama4": "its gate multiplies an expert's input, not its output, and every expert runs on every token",
    "llama4_text": "its gate multiplies an expert's input, not its output, and every expert runs on every token",
}


def count_field(config: PreTrainedConfig) -> str:
    """Name of the number of experts in a family's configuration; empty if it has none of `COUNT_FIELDS`, or several."""
    family = config.model_type.removeprefix(HETEROGENEOUS)
    if family in FIELDS:
        return FIELDS[family]
    names = {config.attribute_map.get(name, name) for name in COUNT_FIELDS if hasattr(config, name)}
    return names.pop() if len(names) == 1 else ""


def check_family(folder: Path, config: dict) -> None:
    """Raise StunError if the family in a checkpoint's config.json is a dense or a refused one, or transformers has none such."""
    whole, text = config.get("model_type"), config.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    if not isinstance(whole, str) or whole.removeprefix(HETEROGENEOUS) not in CONFIG_MAPPING:
        reason = f"transformers {transformers.__version__} has no such family, and code of a checkpoint is never run"
        raise StunError(f"{folder}: model_type {whole!r} is not supported: {reason}")
    for model_type in (whole, inner):
        name = str(model_type).removeprefix(HETEROGENEOUS)
        if name in REFUSED:
            raise StunError(f"{folder}: model_type {model_type!r} is not supported: {REFUSED[name]}")
    has_experts = any("expert" in key or "moe" in key for key, value in entries(config) if value)
    model_type = inner if isinstance(text, dict) else whole
    if isinstance(model_type, str) and model_type.removeprefix(HETEROGENEOUS) not in TESTED and not has_experts:
        raise StunError(
            f"{folder}: model_type {model_type!r} is dense, its config.json names no experts; STUN prunes Mixture-of-Experts "
            "models. For dense ones use llm-compressor (SparseGPTModifier, WandaPruningModifier)"
        )
