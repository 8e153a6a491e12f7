"""Shards: the tensors of a layer that each rank writes, and the files it writes them to."""

import re
from pathlib import Path

import torch

from stun.checkpoint.headers import read_header
from stun.checkpoint.reader import Checkpoint
from stun.checkpoint.writer import Stacked, Tensors, write_tensors
from stun.config import StunError
from stun.files import sample
from stun.model.layer_layout import EXPERT_NUMBER, novice_name, renumber
from stun.run.ledger import REPEAT
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream

Places = dict[str, tuple[str, list[int]]]


def own_tensors(stream: LayerStream, layer: Layer) -> dict[str, torch.Tensor | Stacked]:
    """Tensors of a layer that this rank writes, by source name, the experts kept renumbered. All ranks call this together."""
    writers, rank, layout = stream.writer_of(layer.layout), stream.ranks.rank, layer.layout
    tensors: dict[str, torch.Tensor | Stacked] = {n: tensor for n, tensor in layer.dense.items() if writers[n] == rank}
    tensors |= layer.unused
    for expert, owner, number in zip(layer.kept, layer.owner, layer.written, strict=True):
        if owner == rank:
            for part in layout.experts[expert].keys() - layout.fused:
                names = layout.experts[expert][part]
                rows = [stream.arch.info(name).shape[0] for name in names]
                pieces = layer.experts[expert][part].split(rows)
                tensors |= {renumber(name, number): piece for name, piece in zip(names, pieces, strict=True)}
    names = {expert: novice_name(layout, expert) for expert in layer.novices} if rank == 0 else {}
    tensors |= {name: layer.novices[expert] for expert, name in names.items()}
    for part, name in layout.fused_names.items():
        entries = _entries(stream, layer, part, writers[name])
        if writers[name] == rank:
            tensors[name] = Stacked(entries)
    return tensors


def origins(layer: Layer) -> Places:
    """Source name of each expert's tensors, by the name that they are written under; of a tensor that holds all experts also the
    entries that are kept."""
    layout = layer.layout
    found = {name: (name, layer.kept) for name in layout.fused_names.values()}
    for expert, number in zip(layer.kept, layer.written, strict=True):
        for part in layout.experts[expert].keys() - layout.fused:
            found |= {renumber(name, number): (name, []) for name in layout.experts[expert][part]}
    return found


def as_rounded(stream: LayerStream, layer: Layer, tensors: Tensors) -> tuple[Tensors, Places]:
    """Tensors of a layer with those in place that matrices were rounded to, and the `origins` of all; what is rounded has none.
    All ranks call this together."""
    places, found, rounded = origins(layer), {}, {}
    for name, tensor in tensors.items():
        stored = layer.stored.get((places.get(name, (name, []))[0], None))
        rounded |= {} if stored is None else _renumbered(stored, name)
        found |= {name: tensor} if stored is None and name not in layer.rescaled else {}
    for name in layer.rescaled:
        rounded |= _rescaled(stream, layer, name)
    return found | rounded, places | dict.fromkeys(rounded, ("", []))


def _rescaled(stream: LayerStream, layer: Layer, name: str) -> dict[str, Stacked]:
    """What a tensor of all experts is stored in on new scales, on the rank that writes it."""
    writer, found = stream.writer_of(layer.layout)[name], {}
    for part in stream.arch.source.tensors[name].row(0).parts:
        own = [layer.stored[name, expert][part.name] if expert in layer.experts else None for expert in layer.kept]
        entries = _moved(stream, layer, own, part.info.shape, part.info.dtype, writer)
        found |= {part.name: Stacked(entries)} if entries else {}
    return found


def _renumbered(parts: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Parts of a weight that is written as `name`."""
    number = EXPERT_NUMBER.search(name)
    return {renumber(part, int(number[2])) if number else part: content for part, content in parts.items()}


def as_stored(source: Checkpoint, tensors: Tensors, places: Places, is_changed: bool) -> Tensors:
    """Tensors in the form in which the source stores them: quantised ones are read again, and get other codes where `tensors`
    have other values, if `is_changed`. `places` are `origins`; other tensors have the names that they have in the source."""
    stored: dict[str, torch.Tensor | Stacked] = {}
    for name, tensor in tensors.items():
        origin, rows = places.get(name, (name, []))
        if origin not in source.tensors or not source.tensors[origin].codec:
            stored[name] = tensor
        elif rows:
            entries = tensor.entries if is_changed else [None] * len(rows)
            read = [source.stored(origin, row, entry) for row, entry in zip(rows, entries, strict=True)]
            stored |= {part: Stacked([entry[part] for entry in read]) for part in read[0]}
        else:
            stored |= _renumbered(source.stored(origin, pruned=tensor if is_changed else None), name)
    return stored


def _entries(stream: LayerStream, layer: Layer, part: str, writer: int) -> list[torch.Tensor]:
    """One part of all experts kept, sent to rank `writer`; empty elsewhere."""
    (piece,) = stream.arch.piece(layer.layout, 0, part)
    weights = [layer.experts[expert][part] if expert in layer.experts else None for expert in layer.kept]
    return _moved(stream, layer, weights, piece.shape, piece.dtype, writer)


def _moved(stream: LayerStream, layer: Layer, entries: list, shape: tuple, dtype: torch.dtype, writer: int) -> list[torch.Tensor]:
    """Tensors of the experts kept, None for those of other ranks, on rank `writer`; empty elsewhere."""
    sent = zip(entries, layer.owner, strict=True)
    moved = [stream.ranks.moved(entry, shape, dtype, owner, writer) for entry, owner in sent]
    return [entry for entry in moved if entry is not None]


def write_shard(folder: Path, source: Checkpoint | None, is_changed: bool, name: str, tensors: Tensors, places: Places) -> dict:
    """Write `tensors`, if any, to `folder`/`name`; returns the entry: `file`, the bytes of its `tensors` by name, and a `sample`
    of its content.

    They get the form of the quantised `source`, if there is one; `is_changed`: weights are removed or have other values. `places`
    are the `origins` of experts' tensors. Runs in the background, so the caller must not change the tensors any more.
    """
    if not tensors:
        return {"file": None, "tensors": {}, "sample": ""}
    if source:
        tensors = as_stored(source, tensors, places, is_changed)
    write_tensors(folder / name, tensors)
    return {"file": name, "tensors": {key: tensor.nbytes for key, tensor in tensors.items()}, "sample": sample(folder / name)}


# Files that only an unfinished run has in its folder `model`.
_UNFINISHED = re.compile(r"(layer-\d{5}-\d+-of-\d+|outside)\.safetensors|\..+\.tmp")


def keep_only(folder: Path, entries: list[dict], extras: set[str]) -> None:
    """Remove the shards of an interrupted launch from `folder`, the run's own, that no entry names.

    Raises StunError if the run has not written one of the files (`extras` are those that it writes beside the shards), or if a
    file is missing or holds something else than its entry says.
    """
    known = {entry["file"]: entry for entry in entries if entry["file"]}
    if len(known) < sum(entry["file"] is not None for entry in entries):
        raise StunError(f"{folder}: two entries in the run's folder `progress` name the same file; {REPEAT}")
    unknown = [file for file in sorted(folder.iterdir()) if file.name not in known and file.name not in extras]
    unfinished = [file for file in unknown if _UNFINISHED.fullmatch(file.name) and file.is_file() and not file.is_symlink()]
    if len(unfinished) < len(unknown):
        foreign = next(file for file in unknown if file not in unfinished)
        raise StunError(f"{foreign}: was not written by this run; move it elsewhere, or remove it if it is not needed")
    for file in unfinished:
        file.unlink()
    for name, entry in known.items():
        file, tensors, state = folder / name, entry["tensors"], ""
        if file.is_symlink() or not file.is_file() or file.stat().st_size < sum(tensors.values()):
            state = "is too short" if file.is_file() else "is missing"
        elif {tensor: info.nbytes for tensor, info in read_header(file).items()} != tensors:
            state = "holds other tensors than its entry in `progress` says"
        elif sample(file) != entry["sample"]:
            state = "has changed since"
        if state:
            raise StunError(f"{file}: {state}, but was written whole; {REPEAT}")


def hub_names(entries: list[dict]) -> dict[str, str]:
    """Final names of all files in the entries, in their order: model-00001-of-00003.safetensors as on the Hugging Face Hub."""
    files = [entry["file"] for entry in entries if entry["file"]]
    return {file: f"model-{number:05d}-of-{len(files):05d}.safetensors" for number, file in enumerate(files, 1)}
