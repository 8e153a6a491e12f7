"""Progress of an unfinished evaluation, in a folder beside its output.

<output>.partial/request.json      the request
<output>.partial/hardware.json     device and versions
<output>.partial/batch.json        rows at once, by phase
<output>.partial/scores.json       perplexity and related scores, when finished
<output>.partial/score-N/          finished layers and hidden states, with N rows at once (stun.run.recorder)
<output>.partial/generate-N/       tokens generated so far, one file per micro-batch of N rows
"""

import os
from collections.abc import Callable
from pathlib import Path

from stun.config import StunError
from stun.files import is_count, load_json, write_json
from stun.run.identity import differences
from stun.run.launches import check_progress
from stun.run.lock import LOCK, hold
from stun.run.ownership import refuse_link, remove_written
from stun.schema import FLAG, POSITIVE, TEXT, Leaf, list_of, load_record

_STREAM = r"score-\d+/(progress|hidden)/[\w-]+\.(json|safetensors)"
_WRITTEN = rf"{LOCK}|\w+\.json|{_STREAM}|generate-\d+/tokens-\d+\.json|(.*/)?\..+\.tmp"


class Partial:
    """Folder with the progress of one evaluation."""

    def __init__(self, output: str):
        self.folder = Path(f"{output}.partial")

    def open(self, request: dict, hardware: dict) -> None:
        """Create and lock the folder, or resume from it. Raises StunError if it holds another request (with the differences) or
        began on other hardware, or if another process uses it."""
        machine = self.folder / "hardware.json"
        try:
            self.check(request)
            self.folder.mkdir(parents=True, exist_ok=True)
            hold(self.folder, str(self.folder))
        except OSError as error:
            raise StunError(f"output: {self.folder} cannot be written: {error}") from error
        self.save("request", request)
        if machine.is_file() and (changes := differences(load_json(machine), hardware)):
            raise StunError(f"{self.folder}: began on other hardware ({'; '.join(changes)}); go on there, or remove it")
        self.save("hardware", hardware)
        check_progress(self.folder, str(self.folder))

    def check(self, request: dict) -> None:
        """Raise StunError if the folder cannot be made, or holds another request (with the differences) or other files."""
        file = self.folder / "request.json"
        refuse_link(self.folder)
        parent = next(place for place in self.folder.absolute().parents if os.path.lexists(place))
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise StunError(f"output: {self.folder} cannot be written: {parent} is no folder, or none to write to")
        entries = list(self.folder.iterdir()) if os.path.lexists(self.folder) else []
        if not file.is_file() and any(entry.name not in (LOCK, f".{file.name}.tmp") for entry in entries):
            raise StunError(f"{self.folder}: was not made by an evaluation; move it elsewhere, or choose another output")
        if file.is_file() and (changes := differences(load_json(file), request)):
            where = f"{self.folder}: holds another evaluation ({'; '.join(changes)})"
            raise StunError(f"{where}; remove it, or choose another output")

    def batch(self, phase: str, chosen: int, is_asked: bool) -> int:
        """Rows at once in a phase: as in an earlier launch, else `chosen`. A size set by the user is an upper limit."""
        known = self._sizes().get(phase, chosen)
        size = min(known, chosen) if is_asked else known
        self.set_batch(phase, size)
        return size

    def set_batch(self, phase: str, size: int) -> None:
        self.save("batch", {**self._sizes(), phase: size})

    def _sizes(self) -> dict[str, int]:
        return self.load("batch", {TEXT: POSITIVE})

    def phase(self, name: str, size: int) -> Path:
        """Folder of a phase with `size` rows at once."""
        folder = self.folder / f"{name}-{size}"
        for part in ("progress", "hidden"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        return folder

    def load(self, name: str, kind: object) -> dict:
        """Content of that kind that was saved under `name`, empty if there is none. Raises StunError if it is of another."""
        file = self.folder / f"{name}.json"
        return load_record(file, kind, f"remove {self.folder} to evaluate again") if file.is_file() else {}

    def save(self, name: str, content: dict) -> None:
        write_json(self.folder / f"{name}.json", content)

    def remove(self) -> None:
        remove_written(self.folder, _WRITTEN)


class Generated:
    """Files with the generated tokens of micro-batches, in `folder`: of as many rows as `rows` says for each, token ids below
    `vocab_size`. `is_done` says of the tokens of a row whether it is done."""

    def __init__(self, folder: Path, rows: list[int], vocab_size: int, is_done: Callable[[list[int]], bool]):
        self.folder, self.rows, self.is_done = folder, rows, is_done
        self._token = Leaf("a token of the model", lambda value: is_count(value) and value < vocab_size)

    def _file(self, number: int) -> Path:
        return self.folder / f"tokens-{number:06d}.json"

    def save(self, number: int, state: dict) -> None:
        write_json(self._file(number), state)

    def load(self, number: int) -> dict | None:
        """State of a micro-batch, None if there is no file. Raises StunError if the file is not valid."""
        file, count = self._file(number), self.rows[number]
        if not file.is_file():
            return None
        state = load_record(file, {"tokens": [[self._token]], "done": list_of(FLAG, count)}, "remove it")
        tokens, done = state["tokens"], state["done"]
        is_whole = len(tokens) == count and [self.is_done(ids) for ids in tokens] == done
        if not is_whole or any(self.is_done(ids[:-1]) for ids in tokens):
            raise StunError(f"{file}: does not hold {count} rows as they were generated; remove it")
        if len({len(ids) for ids, is_done in zip(tokens, done, strict=True) if not is_done}) > 1:
            raise StunError(f"{file}: rows that are not done differ in length; remove it")
        return state
