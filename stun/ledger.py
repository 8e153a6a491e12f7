"""What is finished of a stream: one entry a layer and rank, written once all files that it names are on disk.

A layer is finished when the entries of all ranks of one launch are there. Launches may differ in their number of ranks.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from stun.checkpoint import write_json
from stun.config import StunError

_NAME = re.compile(r"(\w+)-(\d{5})-(\d+)-of-(\d+)\.json")


def part_name(layer: int, rank: int, world: int) -> str:
    """What tells one rank's files of one layer apart."""
    return f"{layer:05d}-{rank}-of-{world}"


class Ledger:
    """The entries of one stream, in `folder`."""

    def __init__(self, folder: Path, stream: str):
        self.folder, self.stream = folder, stream

    def record(self, layer: int, rank: int, world: int, entry: dict) -> None:
        """Declare a rank's part of a layer finished."""
        write_json(self.folder / f"{self.stream}-{part_name(layer, rank, world)}.json", entry)

    def finished(self) -> list[list[dict]]:
        """The entries of the finished layers, from the first layer on without a gap; each layer's in rank order."""
        found: dict[int, dict[int, dict[int, Path]]] = defaultdict(lambda: defaultdict(dict))
        for file in self.folder.iterdir():
            match = _NAME.fullmatch(file.name)
            if match and match[1] == self.stream:
                layer, rank, world = (int(number) for number in match.groups()[1:])
                found[layer][world][rank] = file
        layers = []
        while len(layers) in found:
            whole = [files for world, files in sorted(found[len(layers)].items()) if len(files) == world]
            if not whole:
                break
            layers.append([_load(file) for _, file in sorted(whole[0].items())])
        return layers


def _load(file: Path) -> dict:
    try:
        entry = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StunError(f"{file}: cannot be read: {error}") from error
    if not isinstance(entry, dict):
        raise StunError(f"{file}: must hold a JSON object")
    return entry
