"""Atomic writing of a checkpoint's files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from stun.checkpoint.headers import DTYPES
from stun.checkpoint.other_forms import PICKLED
from stun.checkpoint.reader import INDEX
from stun.files import TEMPLATES, write_atomically, write_json
from stun.runtime.device_copies import PIECE, THREADS, Memory, copiers, memory_to_write_from


@dataclass(frozen=True)
class Stacked:
    """A tensor [E, ...] as its E entries, which are written one after the other and never joined in memory."""

    entries: list[torch.Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.entries), *self.entries[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.entries[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


Tensors = Mapping[str, torch.Tensor | Stacked]


def write_tensors(file: Path, tensors: Tensors, is_hashed: bool = False, threads: int = THREADS) -> str:
    """Write one safetensors file atomically, with the bytes that safetensors' own `save_file` writes; returns its SHA-256 if
    `is_hashed`, else an empty text. Tensors of a GPU are copied piece by piece. Raises StunError."""
    digest = hashlib.sha256() if is_hashed else None
    write_atomically(file, lambda path: _write(path, tensors, digest, threads))
    return digest.hexdigest() if digest else ""


def _write(path: Path, tensors: Tensors, digest: hashlib._Hash | None, threads: int) -> None:
    """Write the header, then the content in pieces, each at its place, by so many threads."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: (list(codes).index(item[1].dtype), item[0]))
    header, entries = _header({name: (codes[tensor.dtype], tensor) for name, tensor in ordered}), _entries(ordered)
    device = next((entry_N.device for entry_N in entries if entry_N.is_cuda), torch.device("cpu"))
    memory, start, pieces = memory_to_write_from(device), len(header), []
    memory.depart()
    with path.open("wb", buffering=0) as handle, copiers(device, threads) as pool:
        _write_at(handle.fileno(), memoryview(header), 0)
        if digest:
            digest.update(header)
        for piece_n in (piece_n for entry_N in entries for piece_n in entry_N.split(PIECE)):
            put = partial(_put, handle.fileno(), memory, piece_n, start)
            pieces.append(pool.submit(put, digest, pieces[-1] if pieces else None))
            start += len(piece_n)
        for piece in pieces:
            piece.result()


def _header(tensors: Mapping[str, tuple[str, torch.Tensor | Stacked]]) -> bytes:
    """Length and JSON text of the header, padded to 8 bytes, of tensors with their dtypes' codes, in the file's order."""
    described: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (code, tensor) in tensors.items():
        start, end = end, end + tensor.nbytes
        described[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entries(tensors: list[tuple[str, torch.Tensor | Stacked]]) -> list[torch.Tensor]:
    """Contents as bytes, one tensor after the other."""
    entries = [entry for _, t in tensors for entry in (t.entries if isinstance(t, Stacked) else [t]) if entry.numel()]
    return [entry.contiguous().reshape(-1).view(torch.uint8) for entry in entries]


def _write_at(file: int, view: memoryview, start: int) -> None:
    """Write all bytes of a view, from the file's byte `start` on. The system may take a part of them at a time."""
    written = 0
    while written < len(view):
        written += os.pwrite(file, view[written:], start + written)


def _put(
    file: int, memory: Memory, piece_n: torch.Tensor, start: int, digest: hashlib._Hash | None, before: Future | None
) -> None:
    """Write a piece at its place; `digest` takes it up after the one `before`."""
    with memory.view(piece_n) as view:
        _write_at(file, view, start)
        if digest:
            if before:
                before.result()
            digest.update(view)


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
