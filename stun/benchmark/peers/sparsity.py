"""What a peer has removed from a checkpoint, counted in the tensors that it saved."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import safe_open

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.")


def count(folder: Path) -> dict:
    """Parameters and zeros of the decoder layers of a checkpoint in the hub's layout, and experts of each layer with any."""
    parameters, zeros, experts = 0, 0, {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in filter(_LAYER.match, tensors.keys()):
                tensor = tensors.get_tensor(name)
                parameters += tensor.numel()
                zeros += tensor.numel() - int(tensor.count_nonzero())
                found = _EXPERT.match(name)
                if found:
                    experts.setdefault(int(found[1]), set()).add(int(found[2]))
    return {"parameters": parameters, "zeros": zeros, "experts": [len(experts[layer]) for layer in sorted(experts)]}


def removed(source: Path, pruned: Path) -> dict:
    """`sparsity`, 1 - nonzero after / parameters before in the decoder layers, and `experts` left in each layer with any."""
    before, after = count(source), count(pruned)
    sparsity = 1 - (after["parameters"] - after["zeros"]) / before["parameters"]
    return {"sparsity": sparsity, "zeros": after["zeros"], "experts": after["experts"]}
