"""Rows of local files, folders and hub datasets, read by `datasets`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stun.config import StunError, one_line
from stun.files import parse_json

if TYPE_CHECKING:
    from datasets import Dataset

# File type: the module of `datasets` that reads it, with its settings.
_TEXTS: dict[str, tuple[str, dict]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {}),
}
_PACKED = (".gz", ".zst")
_TYPES = _TEXTS | {kind + packed: how for kind, how in _TEXTS.items() for packed in _PACKED} | {".parquet": ("parquet", {})}
_KNOWN = f"known: {', '.join(_TEXTS)}, each also as {' or '.join(_PACKED)}, and .parquet"
_DEEP = 1000  # brackets open at once: no row has so many, and with 50,000 the reader still works
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json")  # beside the files of a dataset


def load_rows(path: str, key: str, split: str = "train", config: str = "") -> Dataset:
    """Rows of a local file, of a folder of such files, or of a hub dataset (`config` names one of its configurations). Errors
    name the setting `key`. Raises StunError."""
    file, where = Path(path), f"{key}={path}"
    kind = "" if file.is_dir() else _type(file)
    if file.is_dir():
        _check_folder(file, where)
    elif file.is_file() or kind or path.startswith(("/", ".", "~")):
        _check_file(file, where)
    for part in [file] if file.is_file() else file.rglob("*"):
        _check_lines(part, where if part == file else f"{where}: {part.name}")
    # Imported here: it takes seconds and 100 MiB, and only the first rank reads.
    from datasets import load_dataset

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs, it raises too
    try:
        if kind:
            module, settings = _TYPES[kind]
            return load_dataset(module, data_files=str(file), split="train", **settings)
        return load_dataset(path, config or None, split=split)
    except Exception as error:  # datasets raises many kinds, all of them about this path
        raise StunError(f"{where}: datasets cannot load it: {_broken_line(file)}{_reason(error)}") from error


def _type(file: Path) -> str:
    """Key of `_TYPES` that a file's name ends with, in whatever case; empty if there is none."""
    return next((kind for kind in _TYPES if file.name.lower().endswith(kind)), "")


def _check_file(file: Path, where: str) -> None:
    if file.is_file() and not _type(file):
        raise StunError(f"{where}: unknown file type; {_KNOWN}")
    if not file.is_file():
        raise StunError(f"{where}: no such file")
    if not file.stat().st_size:
        raise StunError(f"{where}: the file is empty")
    _check_zstandard([_type(file)], where)


def _check_folder(folder: Path, where: str) -> None:
    """Raise StunError unless the files in a folder are of one type: `datasets` reads only the most frequent one, silently."""
    if (folder / "state.json").is_file():
        call = "datasets.load_from_disk(folder).to_parquet('text.parquet')"
        raise StunError(f"{where}: was written by save_to_disk; write it as a file once: {call}")
    files = (file for file in folder.rglob("*") if not any(part.startswith(".") for part in file.relative_to(folder).parts))
    # As they are written: beside .jsonl, `datasets` passes over .JSONL.
    kinds = {file.name[-len(_type(file)) :] for file in files if _type(file) and file.name not in _ABOUT_DATA}
    plain = sorted({kind.removesuffix(".gz").removesuffix(".zst") for kind in kinds})
    if not plain:
        raise StunError(f"{where}: a folder without files that can be read; {_KNOWN}")
    if len(plain) > 1:
        raise StunError(f"{where}: a folder with files of several types ({', '.join(plain)}); give a file, or one type alone")
    _check_zstandard(kinds, where)


def _check_lines(file: Path, where: str) -> None:
    """Raise StunError for a line of JSON over which the library that reads it would end this process: a row that is null, or is
    nested too deep."""
    if not (_type(file).startswith(".json") and file.is_file()):
        return
    import fsspec

    bad: list[tuple[int, bytes]] = []
    with suppress(Exception), fsspec.open(str(file), compression="infer") as lines:  # `datasets` says what is wrong with the file
        bad = [(number, line) for number, line in enumerate(lines, 1) if _is_null(line) or _brackets(line) > _DEEP]
    for number, line in bad:
        if _brackets(_STRING.sub(b"", line)) > _DEEP:
            raise StunError(f"{where}: line {number} is nested more than {_DEEP} deep")
        if _is_null(line) and (number == 1 or _type(file).startswith(".jsonl")):  # elsewhere in .json it may be one of a list
            raise StunError(f"{where}: line {number} is null, not a JSON object")


def _is_null(line: bytes) -> bool:
    return line[:64].lstrip().startswith(b"null")


def _brackets(line: bytes) -> int:
    """Most brackets of a line that are open at once, those in texts among them; 0 if it has few."""
    if line.count(b"{") + line.count(b"[") <= _DEEP:
        return 0
    most, depth = 0, 0
    for start in range(0, len(line), 2**20):
        byte_N = np.frombuffer(line[start : start + 2**20], np.uint8)
        steps_N = np.isin(byte_N, list(b"{[")).astype(np.int64) - np.isin(byte_N, list(b"}]"))
        depth_N = depth + steps_N.cumsum()
        most, depth = max(most, int(depth_N.max())), int(depth_N[-1])
    return most


def _check_zstandard(kinds: Iterable[str], where: str) -> None:
    if any(kind.lower().endswith(".zst") for kind in kinds) and find_spec("zstandard") is None:
        raise StunError(f"{where}: a package is missing that reads .zst: pip install zstandard")


def _reason(error: Exception) -> str:
    """What `datasets` says, without the words that say nothing."""
    if isinstance(error, StopIteration):
        return "it has no rows"
    says = one_line(error).removeprefix("An error occurred while generating the dataset").strip()
    return says or one_line(error.__cause__ or error)


def in_order(entries: Iterable, path: str, key: str) -> Iterator:
    """Entries of a data set, decoded one by one. Raises StunError if one is not UTF-8."""
    try:
        yield from entries
    except UnicodeDecodeError as error:
        raise StunError(f"{key}={path}: {_broken_line(Path(path))}{error}") from error


def _broken_line(file: Path) -> str:
    """First line of a .jsonl file that is not a JSON object, or whose field changes its type; empty if there is none."""
    kinds: dict[str, type] = {}
    if not file.is_file() or _type(file) != ".jsonl":
        return ""
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            content = parse_json(line, f"line {number}") if line.strip() else {}
        except StunError as error:
            return f"{error}; "
        if not isinstance(content, dict):
            return f"line {number} is not a JSON object; "
        for name, value in content.items():
            if value is not None and kinds.setdefault(name, type(value)) is not type(value):
                return f"line {number}: field {name!r} is {type(value).__name__}, above it {kinds[name].__name__}; "
    return ""


def check_field(rows: Dataset, key: str, name: str, path: str, advice: str = "") -> None:
    """Raise StunError, with `advice`, if the rows have no field of the name that the setting `key` gives."""
    if name not in rows.column_names:
        fields = ", ".join(field if field.isprintable() else repr(field) for field in rows.column_names)
        raise StunError(f"{key}={name}: {path} has the fields {fields[:300]}{advice}")
