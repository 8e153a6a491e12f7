"""What each rank writes of a layer, into which file, behind the computation."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from stun.checkpoint.headers import read_header
from stun.checkpoint.writer import write_tensors
from stun.config import StunError
from stun.model.layer_layout import renumber
from stun.run.ledger import REPEAT
from stun.runtime.device_copies import to_host
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream


def own_tensors(stream: LayerStream, layer: Layer) -> dict[str, torch.Tensor]:
    """What this rank writes of a layer, under source names, survivors renumbered."""
    writers, rank, layout = stream.writer_of(layer.layout), stream.ranks.rank, layer.layout
    tensors = {name: tensor for name, tensor in layer.dense.items() if writers[name] == rank} | layer.unused
    for number, expert in enumerate(layer.kept):
        if layer.owner[number] == rank:
            for part in layout.experts[expert].keys() - layout.fused:
                names = layout.experts[expert][part]
                rows = [stream.arch.info(name).shape[0] for name in names]
                pieces = layer.experts[expert][part].split(rows)
                tensors |= {renumber(name, number): piece for name, piece in zip(names, pieces, strict=True)}
    for part, name in layout.fused_names.items():
        joined = _joined(stream, layer, part, writers[name])
        if writers[name] == rank:
            tensors[name] = joined
    return tensors


def _joined(stream: LayerStream, layer: Layer, part: str, writer: int) -> torch.Tensor:
    """One part of all surviving experts in one tensor on the CPU of rank `writer`, sent there expert by expert; empty
    elsewhere."""
    ranks = stream.ranks
    (piece,) = stream.arch.piece(layer.layout, 0, part)
    shape = (len(layer.kept) if ranks.rank == writer else 0, *piece.shape)
    joined_E = torch.empty(shape, dtype=piece.dtype)
    for number, expert in enumerate(layer.kept):
        own = layer.experts[expert][part] if expert in layer.experts else None
        ranks.move(own, joined_E[number] if ranks.rank == writer else joined_E, layer.owner[number], writer)
    return joined_E


def write_shard(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> dict:
    """Write one file, `name` in `folder`, where there are tensors at all; returns the entry for it: `file` and the bytes of its
    `tensors`. They must not change any more."""
    if not tensors:
        return {"file": None, "tensors": {}}
    stored = {key: to_host(tensor) for key, tensor in tensors.items()}
    write_tensors(folder / name, stored)
    return {"file": name, "tensors": {key: tensor.nbytes for key, tensor in stored.items()}}


# Files that only an unfinished run has in its `model`.
_UNFINISHED = re.compile(r"(layer-\d{5}-\d+-of-\d+|outside)\.safetensors|\..+\.tmp")


def keep_only(folder: Path, entries: list[dict], extras: set[str]) -> None:
    """Remove the shards of an interrupted launch in `folder`, the run's own, that no entry names.

    Raises StunError where a file is there that the run has not written (`extras` are those that it writes beside the shards),
    is missing, or holds other tensors than its entry says. Nothing is removed then.
    """
    known = {entry["file"]: entry["tensors"] for entry in entries if entry["file"]}
    if len(known) < sum(entry["file"] is not None for entry in entries):
        raise StunError(f"{folder}: two entries in the run's folder `progress` name the same file; {REPEAT}")
    others = [file for file in sorted(folder.iterdir()) if file.name not in known and file.name not in extras]
    remains = [file for file in others if _UNFINISHED.fullmatch(file.name) and file.is_file() and not file.is_symlink()]
    if len(remains) < len(others):
        foreign = next(file for file in others if file not in remains)
        raise StunError(f"{foreign}: was not written by this run; move it elsewhere, or remove it where nobody needs it")
    for file in remains:
        file.unlink()
    for name, tensors in known.items():
        file, state = folder / name, ""
        if file.is_symlink() or not file.is_file() or file.stat().st_size < sum(tensors.values()):
            state = "is too short" if file.is_file() else "is missing"
        elif {tensor: info.nbytes for tensor, info in read_header(file).items()} != tensors:
            state = "holds other tensors than its entry in `progress` says"
        if state:
            raise StunError(f"{file}: {state}, but was written whole; {REPEAT}")


def hub_names(entries: list[dict]) -> dict[str, str]:
    """The final name in the hub's form of every file that the entries name, in their order."""
    files = [entry["file"] for entry in entries if entry["file"]]
    return {file: f"model-{number:05d}-of-{len(files):05d}.safetensors" for number, file in enumerate(files, 1)}
