"""One launch at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

from stun.config import StunError

LOCK = ".lock"
_held: IO | None = None


def hold(folder: Path, what: str) -> None:
    """Keep other launches out of a folder, until this process ends or goes on to another one. Raises StunError where one is in
    it already; errors call the folder `what`. File systems without locks keep nobody out."""
    global _held
    if _held:
        _held.close()
    _held = (folder / LOCK).open("a")
    try:
        fcntl.flock(_held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StunError(f"{what}: another launch is at work in it; wait for it, or end it") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
