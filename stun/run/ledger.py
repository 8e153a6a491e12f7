"""Ledger of a stream: one entry per finished layer and rank, written once all files that it names are on disk.

A layer is finished when the entries of all ranks of one launch exist. Launches may differ in their number of ranks.
"""

import re
from collections import defaultdict
from pathlib import Path

from stun.config import StunError
from stun.files import is_file_name, write_json
from stun.run.layer_records import FIELDS, POWERS_SEEN, is_pair
from stun.schema import ASCENDING, COUNT, NULL, TEXT, Leaf, load_record

_NAME = re.compile(r"(\w+)-(\d{5})-(\d+)-of-(\d+)\.json")
REPEAT = "remove the folder `progress` of the run to repeat the stream from its first layer"


def part_name(layer: int, rank: int, world: int) -> str:
    """Part of a file name that identifies layer and rank."""
    return f"{layer:05d}-{rank}-of-{world}"


class Ledger:
    """Entries of one stream in `folder`."""

    def __init__(self, folder: Path, stream: str):
        self.folder, self.stream = folder, stream

    def record(self, layer: int, rank: int, world: int, entry: dict) -> None:
        """Write the entry of a rank's finished part of a layer."""
        write_json(self.folder / f"{self.stream}-{part_name(layer, rank, world)}.json", entry)

    def finished(self) -> list[list[dict]]:
        """Entries, in rank order, of each finished layer, from the first layer up to the first unfinished one."""
        files: dict[int, dict[int, dict[int, Path]]] = defaultdict(lambda: defaultdict(dict))
        for file, layer, rank, world in self._files():
            files[layer][world][rank] = file
        layers = []
        while len(layers) in files:
            complete = [by_rank for world, by_rank in sorted(files[len(layers)].items()) if len(by_rank) == world]
            if not complete:
                break
            layers.append([self._load(file) for _, file in sorted(complete[0].items())])
        return layers

    def restart(self) -> list[list[dict]]:
        """The same; removes the entries behind the last finished layer, which this launch's own would complete though the files
        that they name are gone. No rank may record anything meanwhile."""
        finished = self.finished()
        for file, layer, *_ in self._files():
            if layer >= len(finished):
                file.unlink()
        return finished

    def _files(self) -> list[tuple[Path, int, int, int]]:
        """Files of the stream's entries, each with its layer, rank and number of ranks."""
        named = [(file, _NAME.fullmatch(file.name)) for file in self.folder.iterdir()]
        return [(file, *map(int, match.groups()[1:])) for file, match in named if match and match[1] == self.stream]

    def _load(self, file: Path) -> dict:
        """Entry in a file. Every field is checked, since an entry decides which files are read, renamed and removed."""
        wanted = _ENTRIES[self.stream]
        entry = load_record(file, wanted, REPEAT)
        if entry.keys() != wanted.keys():
            raise StunError(f"{file}: has the fields {sorted(entry)}, must have {sorted(wanted)}; {REPEAT}")
        return entry


_FILE = Leaf("the plain name of a safetensors file", is_file_name)
_SHARD = {"file": (NULL, _FILE), "tensors": {TEXT: COUNT}, "sample": TEXT}
_SNAPSHOT = {"snapshot": (NULL, {"file": _FILE, "sha256": TEXT, "micro_batches": [COUNT]})}
_ENTRIES = {
    "observe": {"seconds": FIELDS["seconds"], "peak_bytes": COUNT, "powers": POWERS_SEEN, **_SNAPSHOT},
    "prune": {"kept": ASCENDING, "unseen": COUNT, **_SHARD, **FIELDS, **_SNAPSHOT},
    "outside": _SHARD,
    "score": {"error": [Leaf("two numbers, 0 or more", is_pair)], **_SNAPSHOT},
    "dense": _SNAPSHOT,
}
