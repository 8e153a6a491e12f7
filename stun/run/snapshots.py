"""Snapshots of hidden states, from which a stream resumes: one file with a checksum per layer and rank."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from stun.checkpoint.headers import read_header
from stun.checkpoint.reader import Checkpoint
from stun.checkpoint.writer import write_tensors
from stun.config import StunError
from stun.files import digest
from stun.model.carried import Carried, Key
from stun.run.ledger import REPEAT, part_name
from stun.runtime.device_copies import memory_to_read_into
from stun.runtime.ranks import Ranks
from stun.stream.layer_stream import States

_DENSE = "dense "  # before the number of a micro-batch: its states in the dense model
_CARRIED = " carries "  # behind it: a value that layers hand on
KEPT = 3  # snapshots per rank: another rank may still be writing the layer before the last


def _named(states: States, numbers: range, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the states of micro-batches with these numbers, by the names that they are saved under."""
    for number, hidden, carried in zip(numbers, states.hidden, states.carried, strict=True):
        yield f"{prefix}{number}", hidden
        for key, value in carried.items():
            yield f"{prefix}{number}{_CARRIED}{key}", value.contiguous()


class Snapshots:
    """Snapshots of one stream in `folder`."""

    def __init__(self, folder: Path, stream: str, ranks: Ranks):
        self.folder, self.stream, self.ranks = folder, stream, ranks
        self.nbytes = 0

    def _file(self, layer: int, rank: int, world: int) -> Path:
        return self.folder / f"{self.stream}-{part_name(layer, rank, world)}.safetensors"

    def save(self, layer: int, states: States) -> dict:
        """Write this rank's states after a layer; returns the ledger's record of the file: name, digest and micro-batches."""
        rank, world = self.ranks.rank, self.ranks.world
        own = range(rank, states.total, world)
        tensors = dict(_named(states, own, ""))
        if states.dense is not None:
            tensors |= _named(states.dense, own, _DENSE)
        file = self._file(layer, rank, world)
        sha256 = write_tensors(file, tensors, is_hashed=True)
        self.nbytes += file.stat().st_size
        return {"file": file.name, "sha256": sha256, "micro_batches": list(own)}

    def drop(self, layer: int) -> None:
        """Remove this rank's snapshot that no rank can need once `layer` is recorded."""
        self._file(layer - KEPT, self.ranks.rank, self.ranks.world).unlink(missing_ok=True)

    def load(self, entries: list[dict], states: States) -> States:
        """This rank's saved states, whatever the number of ranks that saved them; `states` provides shapes and arguments.

        Raises StunError if a snapshot is missing or damaged.
        """
        if None in entries:
            raise StunError(f"{self.folder}: the last finished layer of {self.stream} has no snapshot; {REPEAT}")
        home = {number: entry for entry in entries for number in entry["micro_batches"]}
        mine = range(self.ranks.rank, states.total, self.ranks.world)
        if set(home) != set(range(states.total)):
            raise StunError(f"{self.folder}: the snapshots of {self.stream} do not hold all micro-batches; {REPEAT}")
        for entry in {home[number]["file"]: home[number] for number in mine}.values():
            file = self.folder / entry["file"]
            if not file.is_file() or digest(file) != entry["sha256"]:
                raise StunError(f"{file}: is {'damaged' if file.is_file() else 'missing'}; {REPEAT}")
        files = [(self.folder / home[number]["file"], str(number)) for number in mine]
        read = self._states(files, states, "")
        return read if states.dense is None else replace(read, dense=self._states(files, states.dense, _DENSE))

    def _states(self, files: list[tuple[Path, str]], states: States, prefix: str) -> States:
        """Saved states of the micro-batches in `files`, with the arguments of `states`."""
        hidden = [self._read(file, prefix + name, before) for (file, name), before in zip(files, states.hidden, strict=True)]
        return replace(states, hidden=hidden, carried=[self._carried(file, prefix + name) for file, name in files])

    def _carried(self, file: Path, name: str) -> Carried:
        start = f"{name}{_CARRIED}"
        names = [other for other in read_header(file) if other.startswith(start)]
        return {Key.parse(other.removeprefix(start)): self._read(file, other) for other in names}

    def _read(self, file: Path, name: str, like: torch.Tensor | None = None) -> torch.Tensor:
        """Tensor in a snapshot, of the shape and dtype of `like`, if that is given."""
        info = read_header(file).get(name)
        if like is not None and (info is None or info.shape != like.shape or info.dtype is not like.dtype):
            raise StunError(f"{file}: {name}: must be {tuple(like.shape)} of {like.dtype}; {REPEAT}")
        memory = memory_to_read_into(self.ranks.device)
        with Checkpoint(self.folder, {}, {name: info}).reading(memory) as read:
            hidden = read(name)
        memory.arrive()
        return hidden
