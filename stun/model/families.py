"""Data of the supported model families, one entry each, and the refused ones."""

from dataclasses import dataclass
from pathlib import Path

from stun.checkpoint.config_check import entries
from stun.config import StunError

HETEROGENEOUS = "stun_"  # prefix of the model type where layers keep different numbers of experts
# Lists, in config.json, each layer's experts that are novices, in the form that vLLM reads (its design/expert_substitution.md).
NOVICES = "approximate_experts"
PADDED = "padded_experts"  # lists, in config.json, each layer's experts of zeros that only fill it up
COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Family:
    """Data of one model family.

    `count`: name of the number of experts in config.json. `group_floor`: fewest experts in a routing group (`n_group`); 0 where
    routers have no groups. `floor`: fewest experts per layer that the family's code supports.
    """

    count: str
    group_floor: int = 0
    floor: int = 1


FAMILIES: dict[str, Family] = {
    "arctic": Family("num_local_experts"),
    "deepseek_v2": Family("n_routed_experts", group_floor=1),  # the router ranks groups by their best expert
    "deepseek_v3": Family("n_routed_experts", group_floor=2),  # ... by their two best
    "dots1": Family("n_routed_experts", group_floor=2),
    "ernie4_5_moe": Family("moe_num_experts"),
    "exaone_moe": Family("num_experts", group_floor=2),
    "glm4_moe": Family("n_routed_experts", group_floor=2),
    "gpt_oss": Family("num_local_experts"),
    "granitemoe": Family("num_local_experts"),
    "hunyuan_v1_moe": Family("num_experts"),
    "jamba": Family("num_experts", floor=2),  # with one expert it builds a dense layer
    "lfm2_moe": Family("num_experts"),
    "minimax_m2": Family("num_local_experts"),
    "mixtral": Family("num_local_experts"),
    "olmoe": Family("num_experts"),
    "phimoe": Family("num_local_experts", floor=2),  # its router always picks two
    "qwen2_moe": Family("num_experts"),
    "qwen3_5_moe_text": Family("num_experts"),
    "qwen3_moe": Family("num_experts"),
    "qwen3_next": Family("num_experts"),
}
REFUSED = {
    "dbrx": "its experts run in the family's own code, where the inputs of single experts cannot be observed",
    "llama4": "its gate multiplies an expert's input, not its output, and every expert runs on every token",
    "llama4_text": "its gate multiplies an expert's input, not its output, and every expert runs on every token",
}


def family_of(folder: Path, config: dict) -> tuple[str, Family]:
    """Name and entry of the family in a checkpoint's config.json. Raises StunError if it is not one of `FAMILIES`."""
    model_type, text = config.get("model_type"), config.get("text_config")
    if isinstance(text, dict) and model_type not in REFUSED:
        model_type = text.get("model_type")
    name = str(model_type).removeprefix(HETEROGENEOUS)
    if name in REFUSED:
        raise StunError(f"{folder}: model_type {model_type!r} is not supported: {REFUSED[name]}")
    has_experts = any("expert" in key or "moe" in key for key, value in entries(config) if value)
    if isinstance(model_type, str) and name not in FAMILIES and not has_experts:
        raise StunError(
            f"{folder}: model_type {model_type!r} is dense, its config.json names no experts; STUN prunes Mixture-of-Experts "
            "models. For dense ones use llm-compressor (SparseGPTModifier, WandaPruningModifier)"
        )
    if name not in FAMILIES:
        raise StunError(f"{folder}: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}")
    return name, FAMILIES[name]
