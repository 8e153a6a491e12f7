"""A small random checkpoint of every supported family, saved by transformers itself in the hub's layout."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

import stun  # noqa: F401  (registers Arctic)
from stun.model.text_part import class_of

SHAPE = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2}
GROUPS = {
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "shared_expert_intermediate_size": 40,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SLIDING = {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, dict] = {
    "arctic": {**LOCAL, "intermediate_size": 48, "moe_layer_frequency": 1, "parallel_attn_mlp_res": True},
    "deepseek_v2": {**GROUPS, **LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**GROUPS, **LATENT},
    "dots1": {**GROUPS, "head_dim": 8},
    "ernie4_5_moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "tie_word_embeddings": False,
    },
    "exaone_moe": {
        **{key: value for key, value in GROUPS.items() if key not in ("n_routed_experts", "n_shared_experts")},
        **SLIDING,
        "num_experts": 8,
        "num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "glm4_moe": {**GROUPS, "head_dim": 8, "n_group": 1, "topk_group": 1, "use_qk_norm": True},
    "gpt_oss": {**LOCAL, **SLIDING},
    "granitemoe": {
        **LOCAL,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
    },
    "hunyuan_v1_moe": {"intermediate_size": 24, "num_experts": 8, "moe_topk": 2, "head_dim": 8},
    "jamba": {
        "num_hidden_layers": 4,
        "intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
    },
    "lfm2_moe": {
        **ROUTED,
        "intermediate_size": 64,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
        "norm_topk_prob": True,
        "use_expert_bias": True,
    },
    "minimax_m2": {**LOCAL, "head_dim": 8},
    "mixtral": {**LOCAL, "intermediate_size": 48},
    "olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2},
    "phimoe": LOCAL,
    "qwen2_moe": {**ROUTED, "intermediate_size": 64, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    "qwen3_5_moe_text": {**ROUTED, **LINEAR},
    "qwen3_moe": {
        **ROUTED,
        "intermediate_size": 64,
        "moe_intermediate_size": 48,
        "num_experts_per_tok": 3,
        "head_dim": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "qwen3_next": {**ROUTED, **LINEAR, "intermediate_size": 64},
}
# Those that differ in kind: every run tests them end to end.
KINDS = ["arctic", "deepseek_v3", "ernie4_5_moe", "gpt_oss", "jamba", "mixtral", "phimoe", "qwen3_next"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, ids 3 to 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def randomise(model, seed: int = 7) -> None:
    """Weights large enough that routing varies, and no vector at the value it is born with."""
    torch.manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if "tid2eid" in name:
            for row in tensor:
                row.copy_(torch.randperm(8)[: len(row)])
        if not tensor.is_floating_point():
            continue
        if "bias" in name:
            tensor.normal_(0, 0.1)
        elif tensor.dim() > 1:
            tensor.normal_(0, 0.2)
        else:
            tensor.uniform_(0.8, 1.2)


SEEDS = {"aria": 8, "hy_v3": 11}  # with which every expert is reached by some token
# Names of the hub that transformers reads, and does not write.
HUB_NAMES = {"deepseek_v4": [(r"^model\.", ""), (r"^embed_tokens\.", "embed."), (r"^hc_head\.hc_", "hc_head_")]}


def make_checkpoint(folder: Path, family: str, dtype=torch.float32, shard: str = "60KB", **changes) -> Path:
    """A random model of `family`, saved by transformers itself."""
    from helpers.more_families import MORE  # which takes its parts from here

    content = {**SHAPE, **FAMILIES[family]} if family in FAMILIES else copy.deepcopy(MORE[family])
    config = AutoConfig.for_model(family, **{**content, **changes})
    model = class_of(type(config))._from_config(config)
    randomise(model, SEEDS.get(family, 7))
    model.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    rename(folder, HUB_NAMES.get(family, []))
    return folder


def rename(folder: Path, pairs: list[tuple[str, str]]) -> None:
    """Rename the tensors of a checkpoint by patterns."""
    if not pairs:
        return
    index = folder / "model.safetensors.index.json"
    content, weight_map = json.loads(index.read_text()), {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(file).items():
            for old, new in pairs:
                name = re.sub(old, new, name)
            tensors[name], weight_map[name] = tensor, file.name
        save_file(tensors, file, metadata={"format": "pt"})
    index.write_text(json.dumps({**content, "weight_map": weight_map}))
