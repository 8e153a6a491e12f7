"""What pruning costs beside its limits, on checkpoints made on the spot."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stun.checkpoint import Checkpoint, write_json
from stun.config import BenchmarkConfig, CheckpointShape, PruneConfig, StunError, with_overrides
from stun.data import load_tokenizer
from stun.prune import prune
from stun.ranks import Ranks
from stun.validation import validate


def random_checkpoint(folder: Path, shape: CheckpointShape, tokenizer: Path) -> None:
    """A Qwen3-MoE checkpoint of random weights in bfloat16, with the tokenizer of another checkpoint."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.expert_width,
        num_hidden_layers=shape.layers,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=max(1, shape.hidden // 128),
        head_dim=64,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def disk_seconds(folder: Path, scratch: Path) -> float:
    """Seconds to read all weights of a checkpoint and to write as many bytes to disk, nothing else."""
    start = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        with open(scratch, "wb") as copy:
            copy.write(content)
            copy.flush()
            os.fsync(copy.fileno())
    scratch.unlink()
    return time.perf_counter() - start


def _check(cfg: BenchmarkConfig, ways: dict[str, PruneConfig]) -> None:
    """Raises StunError where something of the request cannot be, before anything is made."""
    folder, shape = Path(cfg.run_dir), cfg.shape
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StunError(f"run_dir={cfg.run_dir}: holds something; choose an empty or new folder")
    if min(shape.expert_width, shape.layers, shape.top_k, shape.vocabulary, shape.hidden // 64) < 1 or shape.hidden % 64:
        raise StunError(f"shape={shape}: numbers above 0 are needed, and hidden a multiple of 64")
    if shape.top_k > shape.experts:
        raise StunError(f"shape.top_k={shape.top_k}: at most shape.experts={shape.experts}")
    load_tokenizer(Path(cfg.model.path))
    for own in ways.values():
        validate(own)


def benchmark_weights(cfg: BenchmarkConfig, ranks: Ranks) -> dict:
    """Seconds and peak memory of every method of `cfg.methods` on one checkpoint, and the seconds that its bytes need alone.

    No expert leaves, so that one stream does all the work. All ranks call this together.
    """
    folder = Path(cfg.run_dir)
    model = folder / "source"
    ways = {m: with_overrides(replace(cfg, model=replace(cfg.model, path=str(model))), o) for m, o in cfg.methods.items()}
    ranks.on_first(lambda: _check(cfg, ways))
    ranks.on_first(lambda: random_checkpoint(model, cfg.shape, Path(cfg.model.path)))
    disk = ranks.on_first(lambda: disk_seconds(model, folder / "scratch"))
    rows = {}
    for method, own in ways.items():
        summary = prune(replace(own, run_dir=str(folder / "run")), ranks)
        rows[method] = {"seconds": summary["seconds"], "peak_bytes": summary["peak_bytes"], "sparsity": summary["sparsity"]}
        ranks.on_first(lambda: shutil.rmtree(folder / "run"))
    nbytes = sum(info.nbytes for info in Checkpoint.open(str(model)).tensors.values())
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{len(os.sched_getaffinity(0))} CPU cores"
    result = {"bytes": nbytes, "disk_seconds": disk, "device": device, "ranks": ranks.world, "methods": rows}
    ranks.on_first(lambda: shutil.rmtree(model))
    ranks.on_first(lambda: write_json(folder / "weights.json", result))
    return result
