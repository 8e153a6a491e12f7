"""Ledger of a stream: one entry per finished layer and rank, written once all files that it names are on disk.

A layer is finished when the entries of all ranks of one launch exist. Launches may differ in their number of ranks.
"""

import re
from collections import defaultdict
from pathlib import Path

from stun.config import StunError
from stun.files import is_count, is_file_name, load_json, write_json
from stun.run.layer_records import FIELDS

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
        for file in self.folder.iterdir():
            match = _NAME.fullmatch(file.name)
            if match and match[1] == self.stream:
                layer, rank, world = (int(number) for number in match.groups()[1:])
                files[layer][world][rank] = file
        layers = []
        while len(layers) in files:
            complete = [by_rank for world, by_rank in sorted(files[len(layers)].items()) if len(by_rank) == world]
            if not complete:
                break
            layers.append([self._load(file) for _, file in sorted(complete[0].items())])
        return layers

    def _load(self, file: Path) -> dict:
        """Entry in a file. Every field is checked, since an entry decides which files are read, renamed and removed."""
        entry, wanted = load_json(file), _ENTRIES[self.stream]
        if entry.keys() != set(wanted):
            raise StunError(f"{file}: has the fields {sorted(entry)}, must have {sorted(wanted)}; {REPEAT}")
        for name, value in entry.items():
            if not _FIELDS[name](value):
                raise StunError(f"{file}: {name}: cannot be {str(value)[:80]}; {REPEAT}")
        return entry


def _is_snapshot(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"file", "sha256", "micro_batches"}:
        return False
    numbers = value["micro_batches"]
    return is_file_name(value["file"]) and type(value["sha256"]) is str and type(numbers) is list and all(map(is_count, numbers))


def _is_pair(value: object) -> bool:
    return type(value) is list and len(value) == 2 and all(type(number) is float and number >= 0 for number in value)


_FIELDS = {
    "kept": lambda value: type(value) is list and all(map(is_count, value)) and value == sorted(set(value)),
    "unseen": is_count,
    "file": lambda value: value is None or is_file_name(value),
    "tensors": lambda value: isinstance(value, dict) and all(map(is_count, value.values())),
    "snapshot": lambda value: value is None or _is_snapshot(value),
    **FIELDS,
    "error": lambda value: type(value) is list and all(map(_is_pair, value)),
}
_ENTRIES = {
    "observe": ["seconds", "peak_bytes", "powers", "snapshot"],
    "prune": ["kept", "unseen", "file", "tensors", *FIELDS, "snapshot"],
    "outside": ["file", "tensors"],
    "score": ["error", "snapshot"],
    "dense": ["snapshot"],
}
