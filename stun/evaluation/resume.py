"""What an evaluation has done so far, in a folder beside its output, while that is not written.

<output>.partial/request.json      what was asked
<output>.partial/batch.json        how many rows run at once, by phase
<output>.partial/scores.json       perplexity and the like, once they are known
<output>.partial/score-N/          finished layers and hidden states, with N rows at once (stun.run.recorder)
<output>.partial/generate-N/       tokens generated so far, a file a micro-batch of N rows
"""

from __future__ import annotations

from pathlib import Path

from stun.config import StunError
from stun.files import is_count, load_json, write_json
from stun.run.identity import differences
from stun.run.lock import LOCK, hold
from stun.run.ownership import remove_written

_STREAM = r"score-\d+/(progress|hidden)/[\w-]+\.(json|safetensors)"
_WRITTEN = rf"{LOCK}|\w+\.json|{_STREAM}|generate-\d+/tokens-\d+\.json|(.*/)?\..+\.tmp"


class Partial:
    """The folder of one evaluation."""

    def __init__(self, output: str):
        self.folder = Path(f"{output}.partial")

    def open(self, request: dict) -> None:
        """Make the folder, or go on in one of the same request. Raises StunError where it holds another (naming what differs), or
        another launch is at work in it."""
        file = self.folder / "request.json"
        if self.folder.is_symlink():
            raise StunError(f"{self.folder}: is a link; nothing is written through one. Put the folder itself there")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not file.is_file() and any(entry.name not in (LOCK, f".{file.name}.tmp") for entry in self.folder.iterdir()):
                raise StunError(f"{self.folder}: was not made by an evaluation; move it elsewhere, or choose another output")
            hold(self.folder, str(self.folder))
        except OSError as error:
            raise StunError(f"output: {self.folder} cannot be written: {error}") from error
        if file.is_file():
            found = differences(load_json(file), request)
            if found:
                raise StunError(
                    f"{self.folder}: holds another evaluation ({'; '.join(found)}); remove it, or choose another output"
                )
            return
        write_json(file, request)

    def batch(self, phase: str, chosen: int, is_asked: bool) -> int:
        """How many rows run at once in a phase: as before, or as chosen now; no more than the user asks for now."""
        known = self._batches().get(phase, chosen)
        size = min(known, chosen) if is_asked else known
        self.set_batch(phase, size)
        return size

    def set_batch(self, phase: str, size: int) -> None:
        write_json(self.folder / "batch.json", {**self._batches(), phase: size})

    def _batches(self) -> dict[str, int]:
        file = self.folder / "batch.json"
        found = load_json(file) if file.is_file() else {}
        if not all(is_count(size) and size for size in found.values()):
            raise StunError(f"{file}: must give numbers of rows; remove {self.folder}")
        return found

    def phase(self, name: str, size: int) -> Path:
        """The folder of a phase with `size` rows at once."""
        folder = self.folder / f"{name}-{size}"
        for part in ("progress", "hidden"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        return folder

    def known(self, name: str) -> dict | None:
        """What an earlier launch entered under a name."""
        file = self.folder / f"{name}.json"
        return load_json(file) if file.is_file() else None

    def enter(self, name: str, content: dict) -> None:
        write_json(self.folder / f"{name}.json", content)

    def remove(self) -> None:
        remove_written(self.folder, _WRITTEN)


class Generated:
    """Files of the tokens of micro-batches, in `folder`; ids are below `vocab_size`."""

    def __init__(self, folder: Path, vocab_size: int):
        self.folder, self.vocab_size = folder, vocab_size

    def _file(self, number: int) -> Path:
        return self.folder / f"tokens-{number:06d}.json"

    def save(self, number: int, state: dict) -> None:
        write_json(self._file(number), state)

    def load(self, number: int) -> dict | None:
        """The state of a micro-batch, None where there is none. Raises StunError where it cannot be one."""
        file = self._file(number)
        if not file.is_file():
            return None
        found = load_json(file)
        tokens, done = found.get("tokens"), found.get("done")
        fits = isinstance(tokens, list) and isinstance(done, list) and len(tokens) == len(done)
        if not fits or not all(isinstance(ids, list) and all(is_count(i) and i < self.vocab_size for i in ids) for ids in tokens):
            raise StunError(f"{file}: does not hold what was generated; remove it")
        if len({len(ids) for ids, is_done in zip(tokens, done, strict=True) if not is_done}) > 1:
            raise StunError(f"{file}: rows that are not done differ in length; remove it")
        return found
