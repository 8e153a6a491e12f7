"""Reading of untrusted JSON and YAML; atomic writing of files."""

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import yaml
from safetensors import SafetensorError

from stun.config import StunError

TEMPLATES = "additional_chat_templates"  # folder in which transformers keeps all chat templates but the first
_DEPTH = 64  # deepest nesting accepted, far below Python's recursion limit
_DIGITS = 40  # most digits of an integer: converting longer ones takes quadratic time


def parse_json(content: bytes | str, where: str) -> object:
    """Value of a JSON text. Infinite numbers and repeated names in one object are refused with StunError."""
    try:
        text = content.decode() if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_number, parse_float=_number, parse_int=_integer)
        _check_depth(value)
        return value
    except (ValueError, RecursionError) as error:
        raise StunError(f"{where}: cannot be read as JSON: {error}") from error


STAYS = "what is finished stays, and the same command goes on"


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Context in which errors of the system, such as a full disk or a forbidden folder, become StunErrors. Memory that runs out
    is none of them."""
    try:
        yield
    except SafetensorError as error:
        raise StunError(f"safetensors: {error}; {STAYS}") from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        # Files that this package reads and writes are named; what it prints has no name.
        named = error.filename or error.errno is None
        raise StunError(f"{'' if named else 'the output, or a file without a name: '}{error}; {STAYS}") from error


@contextlib.contextmanager
def opened(file: Path, where: str = "") -> Iterator[BinaryIO]:
    """A regular file, open for reading; errors name it `where`. Raises StunError."""
    where = where or str(file)
    try:
        # Pipes and devices are not opened, since they may never end.
        if not file.is_file():
            raise StunError(f"{where}: cannot be read: {'not a regular file' if file.exists() else 'no such file'}")
        with file.open("rb") as handle:
            yield handle
    except OSError as error:
        raise StunError(f"{where}: cannot be read: {error}") from error


def read_bytes(file: Path, where: str = "") -> bytes:
    """Content of a regular file; errors name it `where`. Raises StunError."""
    with opened(file, where) as handle:
        return handle.read()


def digest(file: Path) -> str:
    """SHA-256 of a file. Raises StunError."""
    with opened(file) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sample(file: Path) -> str:
    """SHA-256 of 16 evenly spaced pages of a file. Raises StunError."""
    found = hashlib.sha256()
    with opened(file) as handle:
        size = os.fstat(handle.fileno()).st_size
        for part in range(16):
            handle.seek(size * part // 16)
            found.update(handle.read(4096))
    return found.hexdigest()


def read_json(file: Path, where: str = "") -> object:
    """JSON value in a file; errors name it `where`. Raises StunError."""
    return parse_json(read_bytes(file, where), where or str(file))


def load_json(file: Path) -> dict:
    """JSON object in a file. Raises StunError."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise StunError(f"{file}: must hold a JSON object")
    return content


def is_count(value: object) -> bool:
    """Whether a JSON value is an integer of at least 0, and below 2^63 as all that is counted."""
    return type(value) is int and 0 <= value < 2**63


def is_file_name(name: object) -> bool:
    """Whether a JSON value is the plain name (no folders) of a safetensors file."""
    is_text = isinstance(name, str) and name.isprintable() and len(name) < 200
    return is_text and name.endswith(".safetensors") and Path(name).name == name


def check_folder(folder: Path) -> None:
    """Check that everything in a checkpoint's folder is a file or folder of that checkpoint. Raises StunError.

    Links may point into the folder itself and, from a snapshot in the hub's cache, to the blobs of the same model or to those
    that the cache's models share.
    """
    home = folder.resolve()
    model = home.parent.parent
    allowed = [home, model / "blobs", model.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for file in sorted([*folder.iterdir(), *(folder / TEMPLATES).glob("*")]):
        try:
            target = file.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise StunError(f"{file}: is a broken link: {error}") from error
        if not any(target.is_relative_to(place) for place in allowed):
            raise StunError(f"{file}: links to {target}; only files in the checkpoint's own folder are read")
        if not target.is_file() and not target.is_dir():
            raise StunError(f"{file}: is neither a file nor a folder")


def _object(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice in one object")
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
    """Call `write(temporary_path)`, sync, then rename, so that `file` is complete or absent. Raises StunError."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        # A link of that name would redirect the write to its target.
        temporary.unlink(missing_ok=True)
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StunError(f"{file}: cannot be written: {error}; {STAYS}") from error


def write_json(file: Path, content: dict) -> None:
    """Write indented JSON atomically."""
    write_atomically(file, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))


class _Plain(yaml.SafeLoader):
    """YAML loader without aliases: a few lines of nested ones expand to more than any memory holds."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"line {self.peek_event().start_mark.line + 1}: an alias")
        return super().compose_node(parent, index)


def load_yaml(file: Path) -> object:
    """Content of a YAML file, as plain values. Raises StunError."""
    return parse_yaml(read_bytes(file), str(file))


def parse_yaml(content: bytes, where: str) -> object:
    """Content of a YAML text, as plain values. Raises StunError."""
    try:
        return yaml.load(content, _Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise StunError(f"{where}: cannot be read as YAML: {error}") from error
