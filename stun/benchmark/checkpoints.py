"""Checkpoints of random weights in the hub's layout, written tensor by tensor."""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from stun.benchmark.config import CheckpointShape
from stun.checkpoint.writer import write_index, write_tensors
from stun.model.empty import without_weights

SHARD = 10**9  # most bytes in one file, unless a single tensor is larger
DTYPE = torch.bfloat16
DEVIATION = 0.02


def qwen3_moe(shape: CheckpointShape) -> PreTrainedConfig:
    """Config of a Qwen3-MoE model of that shape."""
    return AutoConfig.for_model(
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


def arctic(shape: CheckpointShape) -> PreTrainedConfig:
    """Config of an Arctic model of that shape, experts in every layer; with hidden 7168, its attention is the published one."""
    width = math.gcd(shape.hidden, 128)
    heads = shape.hidden // width
    return AutoConfig.for_model(
        "arctic",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.expert_width,
        num_hidden_layers=shape.layers,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        num_attention_heads=heads,
        num_key_value_heads=math.gcd(heads, 8),
        moe_layer_frequency=1,
        parallel_attn_mlp_res=True,
    )


# Names of an expert's matrices on the hub, by part of the fused tensors.
_PARTS = {
    "qwen3_moe": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    "arctic": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
}


def shapes_of(config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the config's checkpoint on the hub."""
    with without_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    parts = _PARTS[config.model_type]
    for name, tensor in model.state_dict().items():
        path, _, part = name.rpartition(".")
        if part not in parts or not path.endswith(".experts"):
            yield name, tuple(tensor.shape)
            continue
        experts, rows, columns = tensor.shape
        for expert in range(experts):
            for matrix in parts[part]:
                yield f"{path}.{expert}.{matrix}.weight", (rows // len(parts[part]), columns)


def bytes_of(config: PreTrainedConfig) -> int:
    """Bytes of the weights of the config's checkpoint."""
    return sum(math.prod(shape) for _, shape in shapes_of(config)) * DTYPE.itemsize


def write_checkpoint(folder: Path, config: PreTrainedConfig, device: torch.device) -> None:
    """Write random weights, drawn on `device`, with at most one file's tensors in memory; vectors are ones."""
    folder.mkdir(parents=True)
    generator, shards, waiting, size = torch.Generator(device).manual_seed(0), {}, {}, 0

    def write() -> None:
        file = f"model-{len(shards) + 1:05d}.safetensors"
        write_tensors(folder / file, waiting)
        shards[file] = {name: tensor.nbytes for name, tensor in waiting.items()}
        waiting.clear()

    for name, shape in shapes_of(config):
        tensor = torch.ones(shape, dtype=DTYPE, device=device)
        if len(shape) > 1:
            tensor.normal_(0, DEVIATION, generator=generator)
        if waiting and size + tensor.nbytes > SHARD:
            write()
            size = 0
        waiting[name] = tensor.cpu()
        size += tensor.nbytes
    write()
    write_index(folder, shards)
    config.dtype = DTYPE
    config.save_pretrained(folder)


def random_checkpoint(folder: Path, shape: CheckpointShape, tokenizer: Path) -> None:
    """Write a Qwen3-MoE checkpoint of random bfloat16 weights, with the tokenizer of another checkpoint."""
    write_checkpoint(folder, qwen3_moe(shape), torch.device("cpu"))
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def forget(folder: Path) -> None:
    """Ask the system to drop a checkpoint's weights from its cache, so that they are read from disk."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
