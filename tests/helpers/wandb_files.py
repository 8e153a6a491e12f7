"""What W&B's offline runs hold: a `.wandb` file is a log of protocol buffers, in LevelDB's format."""

from __future__ import annotations

import json
import struct
import time
from collections import defaultdict
from pathlib import Path

BLOCK, HEADER = 32768, 7  # bytes; the first block also begins with 7 that say whose file it is


def records(file: Path) -> list:
    """Every record of a file, in its order."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, found, whole = file.read_bytes(), HEADER, [], b""
    assert content[:4] == b":W&B"
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # what is left of a block is padding
            place += BLOCK - place % BLOCK
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + HEADER])
        if not kind:
            break
        whole += content[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(whole))
            whole = b""
    return found


class Launch:
    """One offline folder: `config`, `history[step]`, `summary`, `exit_code`, names of `artifacts`, `run_id`."""

    def __init__(self, folder: Path):
        (file,) = folder.glob("run-*.wandb")
        self.run_id, self.exit_code = file.stem.removeprefix("run-"), None
        self.config, self.summary, self.artifacts = {}, {}, []
        self.history: dict[int, dict] = defaultdict(dict)
        for record in records(file):
            if record.HasField("run"):
                self.config |= _values(record.run.config.update)
                assert not record.run.host and not record.run.git.remote_url
            elif record.HasField("history"):
                row = _values(record.history.item)
                self.history[row.pop("_step")] |= {k: v for k, v in row.items() if not k.startswith("_")}
            elif record.HasField("summary"):
                self.summary |= _values(record.summary.update)
            elif record.HasField("exit"):
                self.exit_code = record.exit.exit_code
            elif record.HasField("artifact"):
                self.artifacts += [entry.path for entry in record.artifact.manifest.contents]


def launches(run: Path) -> list[Launch]:
    """Those of a run folder, in their order, once all have ended: W&B's own process writes a little after it was told."""
    deadline = time.monotonic() + 20
    while True:
        found = [Launch(folder) for folder in sorted((run / "tracking" / "wandb").glob("offline-run-*"))]
        if time.monotonic() > deadline or all(launch.exit_code is not None for launch in found):
            return found
        time.sleep(0.1)


def _values(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
