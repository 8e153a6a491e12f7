"""JSON and YAML in, with nothing assumed of them; files out, each whole or absent."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path

import yaml
from safetensors import SafetensorError

from stun.config import StunError

TEMPLATES = "additional_chat_templates"  # where transformers keeps all chat templates but the first
_DEPTH = 64  # of values in values: far below what Python follows
_DIGITS = 40  # of the longest number that means anything; what is longer takes time without end to print


def parse_json(content: bytes | str, where: str) -> object:
    """The value that JSON text stands for: finite numbers, and no name twice in one object. Raises StunError."""
    try:
        text = content.decode() if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_number, parse_float=_number, parse_int=_integer)
        _check_depth(value)
        return value
    except (ValueError, RecursionError) as error:
        raise StunError(f"{where}: cannot be read as JSON: {error}") from error


def read_bytes(file: Path, where: str = "") -> bytes:
    """The content of a regular file, which errors call `where`. Pipes and devices, which may have no end, are not opened. Raises
    StunError."""
    where = where or str(file)
    try:
        if not file.is_file():
            raise StunError(f"{where}: cannot be read: {'not a regular file' if file.exists() else 'no such file'}")
        return file.read_bytes()
    except OSError as error:
        raise StunError(f"{where}: cannot be read: {error}") from error


def read_json(file: Path, where: str = "") -> object:
    """The JSON value in a file, which errors call `where`. Raises StunError."""
    return parse_json(read_bytes(file, where), where or str(file))


def load_json(file: Path) -> dict:
    """The JSON object in a file. Raises StunError."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise StunError(f"{file}: must hold a JSON object")
    return content


def is_count(value: object) -> bool:
    """Whether a value from JSON is a whole number, 0 or more."""
    return type(value) is int and value >= 0


def is_file_name(name: object, suffix: str = ".safetensors") -> bool:
    """Whether a value from JSON names a file beside the one it stands in."""
    return isinstance(name, str) and name.endswith(suffix) and name.isprintable() and Path(name).name == name and len(name) < 200


def check_folder(folder: Path) -> None:
    """Raise StunError where a file in a checkpoint's folder did not come with it, or is none: all of them may be read or copied.

    Links may lead anywhere in the folder and, from a snapshot in the hub's cache, to the blobs of the same model.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for file in sorted([*folder.iterdir(), *(folder / TEMPLATES).glob("*")]):
        try:
            target = file.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise StunError(f"{file}: is a link that leads nowhere: {error}") from error
        if not any(target.is_relative_to(place) for place in homes):
            raise StunError(f"{file}: leads to {target}; only files in the checkpoint's own folder are read")
        if not target.is_file() and not target.is_dir():
            raise StunError(f"{file}: is neither a file nor a folder")


def _object(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return content


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(_DEPTH):
        parts = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list)))
        level = [entry for part in parts for entry in part]
    if level:
        raise ValueError(f"values are nested more than {_DEPTH} deep")


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:_DIGITS]} is not a finite number")
    return number


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"{text[:_DIGITS]}... has {len(text)} digits")
    return int(text)


def write_atomically(file: Path, write) -> None:
    """Call `write(temporary_path)`, sync, then rename: `file` is either whole or absent. Raises StunError."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link there would have its target written
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StunError(f"{file}: cannot be written: {error}") from error


def write_json(file: Path, content: dict) -> None:
    """Write `content` as indented JSON, atomically."""
    write_atomically(file, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))


class _Plain(yaml.SafeLoader):
    """Without aliases, of which a few lines can make more than any memory holds."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"line {self.peek_event().start_mark.line + 1}: an alias")
        return super().compose_node(parent, index)


def load_yaml(file: Path) -> object:
    """What a YAML file holds, in plain values. Raises StunError."""
    return parse_yaml(read_bytes(file), str(file))


def parse_yaml(content: bytes, where: str) -> object:
    """What YAML stands for, in plain values. Raises StunError."""
    try:
        return yaml.load(content, _Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise StunError(f"{where}: cannot be read as YAML: {error}") from error
