"""The tensors of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(files):
        own = load_file(folder / file)
        assert not tensors.keys() & own.keys(), "a tensor stands in one file only"
        tensors |= own
    return tensors


def same_tensors(one: Path, two: Path) -> None:
    """Assert that two checkpoints hold the same names and bytes."""
    first, second = load_tensors(one), load_tensors(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(
            tensor.contiguous().view(torch.uint8), second[name].contiguous().view(torch.uint8)
        ), name
