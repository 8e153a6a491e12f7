"""Ownership of folders: a mark names the run that created a folder, and only files written by that run are removed."""

import contextlib
import os
import re
import shutil
import uuid
from pathlib import Path

from stun.config import StunError
from stun.files import write_atomically

MARK = ".stun"  # file that names the run to which its folder belongs


def run_id(folder: Path) -> str:
    """Random name of the run in `folder`, set at its first launch. Raises StunError if it cannot be read or written."""
    file = folder / MARK
    if not os.path.lexists(file):
        _mark(folder, uuid.uuid4().hex)
    return _read(file)


def own_folder(folder: Path, name: str) -> None:
    """Create `folder` for the run called `name`, or accept the one that this run created.

    Raises StunError, and changes nothing, if it is a link, a file, or not empty and without this run's mark.
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
        raise StunError(f"{folder}: holds files not written by this run; move it elsewhere, or choose another folder for the run")


def release(folder: Path) -> None:
    """Remove the mark, so that nothing in `folder` can be removed."""
    if not folder.is_symlink():
        (folder / MARK).unlink(missing_ok=True)


def remove_written(folder: Path, names: str) -> None:
    """Remove files below `folder` whose relative path matches the regular expression `names`, then empty folders. Links are
    neither followed nor removed; a missing `folder`, or one that is a link, is ignored."""
    if folder.is_symlink():
        return
    pattern = re.compile(names)
    for parent, _, files in os.walk(folder, topdown=False):
        for file in (Path(parent) / name for name in files):
            if pattern.fullmatch(file.relative_to(folder).as_posix()) and not file.is_symlink():
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            Path(parent).rmdir()


def remove_run(folder: Path) -> None:
    """Remove a run folder that the calling job created. A link, or a folder without a run, is kept."""
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
