"""Peak memory does not grow with depth."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import MixtralConfig

from helpers.launches import run_job, settings
from helpers.zoo import SHAPE, byte_tokenizer
from stun.checkpoint.writer import write_index, write_tensors
from stun.files import write_json

WIDTH = {"hidden_size": 512, "intermediate_size": 768, "num_local_experts": 32, "num_experts_per_tok": 2}


def deep_checkpoint(folder, depth: int):
    """A Mixtral of `depth` layers, about 150 MB of float32 each, a shard a layer."""
    torch.manual_seed(0)
    hidden, width, head = WIDTH["hidden_size"], WIDTH["intermediate_size"], 128
    config = MixtralConfig(**{**SHAPE, **WIDTH, "num_hidden_layers": depth, "architectures": ["MixtralForCausalLM"]})
    folder.mkdir()
    write_json(folder / "config.json", config.to_dict())
    byte_tokenizer().save_pretrained(folder)
    norm, square = torch.ones(hidden), torch.randn(hidden, hidden) / hidden**0.5
    parts = {"w1": torch.randn(width, hidden), "w2": torch.randn(hidden, width), "w3": torch.randn(width, hidden)}
    experts = [{part: w * (1 + 0.1 * e) / 30 for part, w in parts.items()} for e in range(WIDTH["num_local_experts"])]
    router = torch.randn(WIDTH["num_local_experts"], hidden)
    shards = {"outer.safetensors": {"model.embed_tokens.weight": torch.randn(260, hidden), "model.norm.weight": norm}}
    shards["outer.safetensors"]["lm_head.weight"] = torch.randn(260, hidden)
    for layer in range(depth):
        prefix = f"model.layers.{layer}."
        own = {f"{prefix}{name}_layernorm.weight": norm.clone() for name in ("input", "post_attention")}
        own |= {f"{prefix}self_attn.{name}_proj.weight": square.clone() for name in "qo"}
        own |= {f"{prefix}self_attn.{name}_proj.weight": square[: 2 * head].clone() for name in "kv"}
        own[f"{prefix}block_sparse_moe.gate.weight"] = router
        for e, expert in enumerate(experts):
            own |= {f"{prefix}block_sparse_moe.experts.{e}.{part}.weight": w for part, w in expert.items()}
        shards[f"layer{layer}.safetensors"] = own
    for file, tensors in shards.items():
        write_tensors(folder / file, tensors)
    write_index(folder, {file: {name: t.nbytes for name, t in tensors.items()} for file, tensors in shards.items()})
    return sum(t.nbytes for t in shards["layer0.safetensors"].values())


@pytest.mark.ranks
@pytest.mark.slow
def test_peak_does_not_grow_with_depth(tmp_path):
    """The second half of 12 layers needs what the first half needs, in both streams, on both ranks.

    How far a write lags behind the next read is chance, and a peak is the largest of one draw a layer; so both halves get 6.
    """
    layer = deep_checkpoint(tmp_path / "model", 12)
    small = {"calibration__samples": 8, "calibration__length": 64, "calibration__micro_batch": 4}
    run_job("prune", settings(tmp_path / "model", tmp_path / "run", **small), 2)
    streams = json.loads((tmp_path / "run" / "layers.json").read_text())
    for name in ("observe", "prune"):
        peaks = [entry["peak_bytes"] for entry in streams[name]]
        grown = (max(peaks[6:]) - max(peaks[:6])) / layer
        print(f"{name}: layer {layer / 2**20:.1f} MiB, peaks {[p // 2**20 for p in peaks]} MiB: {grown:+.3f} layers")
        assert len(peaks) == 12 and grown < 0.1
