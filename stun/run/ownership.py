"""Ownership of folders: a mark names the run that created a folder, and only files written by that run are removed."""

import contextlib
import os
import re
import uuid
from pathlib import Path

from stun.config import StunError
from stun.files import write_atomically

MARK = ".stun"  # file that names the run to which its folder belongs


def own_part(folder: Path) -> None:
    """Create `folder` for the run in the folder above it, or accept the one that this run created. Raises as `own_folder`."""
    run = folder.parent / MARK  # holds the run's random name, set at its first launch
    if not os.path.lexists(run):
        _mark(folder.parent, uuid.uuid4().hex)
    own_folder(folder, _read(run))


def refuse_link(folder: Path) -> None:
    """Raises StunError if `folder` is a link."""
    if folder.is_symlink():
        raise StunError(f"{folder}: is a link; nothing is written or removed through a link. Put the folder itself there")


def own_folder(folder: Path, name: str) -> None:
    """Create `folder` for the run called `name`, or accept the one that this run created.

    Raises StunError, and changes nothing, if it is a link, a file, or not empty and without this run's mark.
    """
    refuse_link(folder)
    try:
        folder.mkdir(exist_ok=True)
        is_marked, is_empty = os.path.lexists(folder / MARK), {file.name for file in folder.iterdir()} <= {f".{MARK}.tmp"}
    except OSError as error:
        raise StunError(f"{folder}: cannot be used: {error}") from error
    if is_empty:
        _mark(folder, name)
    elif not is_marked or _read(folder / MARK) != name:
        raise StunError(f"{folder}: holds files not written by this run; move it elsewhere, or choose another folder for the run")


def release(folder: Path) -> None:
    """Remove the mark, so that nothing in `folder` can be removed."""
    if not folder.is_symlink():
        with contextlib.suppress(OSError):
            (folder / MARK).unlink(missing_ok=True)


def discard(folder: Path, names: str) -> bool:
    """Remove the files of a marked folder that `remove_written` removes, then the mark and the folder if nothing else is in it.
    Whether the folder is gone. The mark goes last: a launch that is killed in between can do it again."""
    remove_written(folder, names)
    if folder.is_dir() and not folder.is_symlink() and {file.name for file in folder.iterdir()} <= {MARK}:
        release(folder)
        with contextlib.suppress(OSError):
            folder.rmdir()
    return not os.path.lexists(folder)


def remove_written(folder: Path, names: str) -> None:
    """Remove files below `folder` whose relative path matches the regular expression `names`, then empty folders. Links are
    neither followed nor removed; a missing `folder`, or one that is a link, is ignored."""
    if folder.is_symlink():
        return
    pattern = re.compile(names)
    for parent, _, files in os.walk(folder, topdown=False):
        for file in (Path(parent) / name for name in files):
            if pattern.fullmatch(file.relative_to(folder).as_posix()) and not file.is_symlink():
                with contextlib.suppress(OSError):  # a file that cannot be removed does no harm
                    file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            Path(parent).rmdir()


# Paths of the files that a run, and its evaluation, write in its folder.
_OF_RUN = (
    rf"(plan|layers|manifest|result|budget|search|served)\.json|search\.png|\.lock|{re.escape(MARK)}|\..+\.tmp"
    r"|(stats|progress|hidden|model|tracking|result\.json\.partial)/.+"
)


def remove_run(folder: Path) -> None:
    """Remove what a run has written in its folder, which the calling job created, and the folder if nothing else is in it. A
    link, or a folder without a run, is kept."""
    if (folder / "config.yaml").is_file():
        remove_written(folder, _OF_RUN)
        remove_written(folder, r"config\.yaml")  # last: a launch that is killed in between still knows the folder as a run


def _mark(folder: Path, name: str) -> None:
    write_atomically(folder / MARK, lambda path: path.write_text(f"{name}\n"))


def _read(file: Path) -> str:
    try:
        if file.is_symlink() or not file.is_file():
            raise StunError(f"{file}: must be a file that a run wrote")
        return file.read_bytes()[:200].decode(errors="replace").strip()
    except OSError as error:
        raise StunError(f"{file}: cannot be read: {error}") from error
