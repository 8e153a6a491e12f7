"""Atomic writing of a checkpoint's files."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from stun.checkpoint.other_forms import PICKLED
from stun.checkpoint.reader import INDEX
from stun.files import TEMPLATES, write_atomically, write_json


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one safetensors file atomically."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(path: Path) -> None:
        save_file(contiguous, path, metadata={"format": "pt"})
        # safetensors makes files that their owner alone can read.
        path.chmod(0o644)

    write_atomically(file, write)


def write_index(folder: Path, shards: dict[str, dict[str, int]]) -> None:
    """Write the index: `shards` maps a file name to its tensors' names and bytes."""
    weight_map = {name: shard for shard, sizes in shards.items() for name in sizes}
    total = sum(size for sizes in shards.values() for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def extras(source: Path) -> list[str]:
    """Paths in `source` of all files but weights and config.json: tokenizer, chat templates, custom code, licence."""
    weights = (".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", *PICKLED)
    files = sorted([*source.iterdir(), *(source / TEMPLATES).glob("*.jinja")])
    is_weights = {file: file.suffix in weights or file.name.endswith(".index.json") for file in files}
    kept = (f for f in files if f.is_file() and not is_weights[f] and not f.name.startswith(".") and f.name != "config.json")
    return [str(file.relative_to(source)) for file in kept]


def copy_extras(source: Path, target: Path, skip: Iterable[str] = ()) -> None:
    """Copy the `extras` of a checkpoint except those in `skip`."""
    for name in (name for name in extras(source) if name not in skip):
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        write_atomically(copy, lambda path, name=name: shutil.copyfile(source / name, path))
