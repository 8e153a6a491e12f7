"""What each rank writes of a layer, into which file, behind the computation."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from stun.arch import Architecture
from stun.checkpoint import write_tensors
from stun.compressed import compress
from stun.layout import LayerLayout, renumber
from stun.plan import LayerPlan
from stun.stream import Layer, LayerStream


def cluster_owners(plan: LayerPlan, world: int) -> list[int | None]:
    """Owner of every expert for the second stream: clusters stay together, survivors are spread evenly.

    An expert whose weights are not needed has no owner: nobody reads it.
    """
    owners: list[int | None] = [None] * plan.experts
    for place, cluster in enumerate(plan.clusters):
        for expert in plan.needed.intersection(cluster):
            owners[expert] = place * world // len(plan.clusters)
    return owners


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


def shard_files(arch: Architecture, plans: list[LayerPlan], world: int) -> tuple[str, list[list[str | None]]]:
    """File names in the hub's form: one for everything outside the layers, then one per layer and rank that has a part of it."""
    parts = []
    for layout, plan in zip([*arch.layers, *arch.mtp], plans, strict=True):
        busy = set(range(min(len(layout.copied) + len(layout.fused), world)))
        if not _is_fused(layout):
            busy |= {owner for owner in cluster_owners(plan, world) if owner is not None}
        parts += [(layout.index, rank) for rank in sorted(busy)]
    names = [f"model-{number + 1:05d}-of-{len(parts) + 1:05d}.safetensors" for number in range(len(parts) + 1)]
    table: list[list[str | None]] = [[None] * world for _ in plans]
    for (index, rank), name in zip(parts, names[1:], strict=True):
        table[index][rank] = name
    return names[0], table


def _is_fused(layout: LayerLayout) -> bool:
    """Whether no expert of the layer has a tensor of its own."""
    return bool(layout.experts) and layout.fused == layout.experts[0].keys()


class ShardWriter:
    """Writes shards behind the computation, one at a time; at most one waits, so memory stays bounded.

    After `close`, `written` maps every file to the bytes of each tensor in it.
    """

    def __init__(self, folder: Path, is_compressed: bool = False):
        self.folder, self.is_compressed = folder, is_compressed
        self.written: dict[str, dict[str, int]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: Future | None = None

    def submit(self, file: str, tensors: dict[str, torch.Tensor]) -> float:
        """Queue one file once the one before is on disk; returns the seconds waited. The tensors must not change any more."""
        start = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - start
        self._pending = self._pool.submit(self._write, self.folder / file, tensors)
        return waited

    def _write(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        stored, metadata = {name: tensor.cpu() for name, tensor in tensors.items()}, None
        if self.is_compressed:
            stored, metadata = compress(stored)
        write_tensors(file, stored, metadata)
        self.written[file.name] = {name: tensor.nbytes for name, tensor in stored.items()}

    def wait(self) -> None:
        """Return once everything submitted is on disk; raises what writing raised."""
        if self._pending:
            self._pending.result()

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()
