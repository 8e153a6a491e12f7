"""Sparsity reached by a peer, counted in the tensors that it saved."""

import re
from pathlib import Path

from safetensors import safe_open

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.")


def count(folder: Path) -> dict:
    """Parameters and zeros in the decoder layers of a checkpoint in the hub's layout, and experts by layer that has any."""
    parameters, zeros, experts = 0, 0, {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in filter(_LAYER.match, tensors.keys()):
                tensor = tensors.get_tensor(name)
                parameters += tensor.numel()
                zeros += tensor.numel() - int(tensor.count_nonzero())
                match = _EXPERT.match(name)
                if match:
                    experts.setdefault(int(match[1]), set()).add(int(match[2]))
    return {"parameters": parameters, "zeros": zeros, "experts": [len(experts[layer]) for layer in sorted(experts)]}


def removed(source: Path, pruned: Path) -> dict:
    """`sparsity`, 1 - nonzero after / parameters before in the decoder layers, and `experts` kept by layer that has any."""
    before, after = count(source), count(pruned)
    sparsity = 1 - (after["parameters"] - after["zeros"]) / before["parameters"]
    return {"sparsity": sparsity, "zeros": after["zeros"], "experts": after["experts"]}
