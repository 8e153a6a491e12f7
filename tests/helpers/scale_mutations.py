"""What a block-scaled checkpoint may be turned into; see tests/helpers/mutations.py."""

from __future__ import annotations

import torch

from helpers.mutations import HUGE, Mutation, edit, mapped, rewritten, tensor

SCALED = "model.layers.1.mlp.experts.0.up_proj.weight"
SCALE = f"{SCALED}_scale_inv"


def blocks(value: object) -> Mutation:
    return edit("config.json", lambda content: content["quantization_config"].update(weight_block_size=value))


SCALES: dict[str, tuple[Mutation, str]] = {
    "block huge": (blocks([HUGE, HUGE]), "config.json: weight_block_size"),
    "block of a million": (blocks([10**6, 10**6]), "_scale_inv has shape"),
    "block of one": (blocks([1, 1]), "_scale_inv has shape"),
    "block zero": (blocks([0, 8]), "config.json: weights are quantised"),
    "block bool": (blocks([True, True]), "config.json: weight_block_size|config.json: weights are quantised"),
    "block null": (blocks(None), "config.json: weights are quantised"),
    "scales flat": (tensor(SCALE, torch.flatten), f"safetensors: {SCALE} has shape"),
    "scales transposed": (tensor(SCALE, lambda t: t.T), f"safetensors: {SCALE} has shape"),
    "scales of integers": (tensor(SCALE, lambda t: t.to(torch.int32)), f"safetensors: {SCALE} holds torch.int32"),
    "no scales": (rewritten(lambda tensors: tensors.pop(SCALE), SCALE), f"safetensors: {SCALED} is fp8 but has no"),
    "scales elsewhere": (mapped("../a.safetensors", SCALE), f"{SCALE}: names the file"),
    "matrix flat": (tensor(SCALED, torch.flatten), f"{SCALE} has shape"),
}
