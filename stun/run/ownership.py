"""Folders that this package makes for itself. A mark in each says which run made it; only files that a run writes are removed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from pathlib import Path

from stun.config import StunError
from stun.files import write_atomically

MARK = ".stun"  # in a folder that is made: the run it belongs to


def run_id(folder: Path) -> str:
    """The random name of the run in `folder`, made at its first launch. Raises StunError where it cannot be read or written."""
    file = folder / MARK
    if not os.path.lexists(file):
        _mark(folder, uuid.uuid4().hex)
    return _read(file)


def own_folder(folder: Path, name: str) -> None:
    """Make `folder` for the run called `name`, or go on in the one that it has made.

    Raises StunError where the folder is a link, a file, or holds what this run did not write: nothing in it is touched then.
    """
    if folder.is_symlink():
        raise StunError(f"{folder}: is a link; nothing is written or removed through a link. Put the folder itself there")
    try:
        folder.mkdir(exist_ok=True)
        is_marked, is_empty = os.path.lexists(folder / MARK), not any(folder.iterdir())
    except OSError as error:
        raise StunError(f"{folder}: cannot be used: {error}") from error
    if is_empty:
        _mark(folder, name)
    elif not is_marked or _read(folder / MARK) != name:
        raise StunError(f"{folder}: holds what this run has not written; move it elsewhere, or choose another folder for the run")


def release(folder: Path) -> None:
    """Remove the mark, once nothing will be removed from `folder` any more."""
    if not folder.is_symlink():
        (folder / MARK).unlink(missing_ok=True)


def remove_written(folder: Path, names: str) -> None:
    """Remove the files below `folder` whose path within it matches the regular expression `names`, then the folders that this
    empties. Links are not followed, and everything else stays. Does nothing where `folder` is missing or a link."""
    if folder.is_symlink():
        return
    pattern = re.compile(names)
    for place, _, files in os.walk(folder, topdown=False):
        for file in (Path(place) / name for name in files):
            if pattern.fullmatch(file.relative_to(folder).as_posix()) and not file.is_symlink():
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            Path(place).rmdir()


def remove_run(folder: Path) -> None:
    """Remove a whole run folder that the caller's job has made. A link, or a folder that holds no run, stays."""
    if not folder.is_symlink() and (folder / "config.yaml").is_file():
        shutil.rmtree(folder, ignore_errors=True)


def _mark(folder: Path, name: str) -> None:
    write_atomically(folder / MARK, lambda path: path.write_text(f"{name}\n"))


def _read(file: Path) -> str:
    try:
        if file.is_symlink() or not file.is_file():
            raise StunError(f"{file}: must be a file that a run wrote")
        return file.read_bytes()[:200].decode(errors="replace").strip()
    except OSError as error:
        raise StunError(f"{file}: cannot be read: {error}") from error
