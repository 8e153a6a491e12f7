"""Peak memory does not grow with depth."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SHAPE, TEXT, byte_tokenizer, run_job
from transformers import MixtralConfig

from stun.checkpoint import write_index, write_json, write_tensors

WIDTH = {"hidden_size": 512, "intermediate_size": 384, "num_local_experts": 64, "num_experts_per_tok": 2}


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


@pytest.mark.launch
def test_peak_does_not_grow_with_depth(tmp_path):
    peaks, layer = {}, 0
    for depth in (4, 16):
        layer = deep_checkpoint(tmp_path / f"model{depth}", depth)
        arguments = [
            f"model.path={tmp_path / f'model{depth}'}", f"calibration.path={TEXT}", "calibration.samples=8",
            "calibration.length=64", "calibration.micro_batch=4", "target=0.4", f"run_dir={tmp_path / f'run{depth}'}",
        ]  # fmt: skip
        run_job("prune", arguments, 2)
        peaks[depth] = json.loads((tmp_path / f"run{depth}" / "manifest.json").read_text())["summary"]["peak_bytes"]
    grown = (peaks[16] - peaks[4]) / layer
    print(f"layer {layer / 2**20:.1f} MiB, peak {peaks[4] / 2**20:.1f} -> {peaks[16] / 2**20:.1f} MiB: {grown:+.3f} layers")
    assert grown < 0.1
