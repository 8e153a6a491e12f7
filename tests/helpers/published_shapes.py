"""Checkpoints of the shapes that large models were released in, headers alone: their files have the size and hold nothing."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers.zoo import byte_tokenizer
from stun.model.empty import without_weights
from stun.model.text_part import class_of

# Model type -> what differs from the configuration that transformers has as the default of its family.
SHAPES = {
    "deepseek_v4": {},
    "glm_moe_dsa": {},
    "kimi_k2": {"vocab_size": 163840, "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "num_attention_heads": 64}
    | {"num_key_value_heads": 64, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827},
}
_FAMILY = {"kimi_k2": "deepseek_v3"}
_RENAMED = {"deepseek_v4": [(r"^model\.", ""), (r"^embed_tokens\.", "embed."), (r"^hc_head\.hc_", "hc_head_")]}
_CODES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}


def write(folder: Path, model_type: str, files: int = 40) -> Path:
    """The checkpoint's folder, with config, tokenizer and index."""
    cfg = CONFIG_MAPPING[_FAMILY.get(model_type, model_type)](**SHAPES[model_type])
    with without_weights():
        model = class_of(type(cfg))._from_config(cfg, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    tensors, places = list(revert_weight_conversion(model, model.state_dict()).items()), {}
    size = len(tensors) // files + 1
    for start in range(0, len(tensors), size):
        file, header, end = f"model-{start:06d}.safetensors", {}, 0
        for name, tensor in tensors[start : start + size]:
            for pattern, new in _RENAMED.get(model_type, []):
                name = re.sub(pattern, new, name)
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            places[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + end)
    content = {**cfg.to_dict(), "model_type": model_type, "architectures": [type(model).__name__], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content, default=str))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    byte_tokenizer().save_pretrained(folder)
    return folder
