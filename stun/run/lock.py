"""Lock of a folder: one launch at a time."""

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import IO

from stun.config import StunError

LOCK = ".lock"
_held: IO | None = None


def hold(folder: Path, where: str) -> None:
    """Lock a folder until `let_go`, the next `hold`, or the end of this process; errors name it `where`. Raises StunError if
    another launch holds the lock. On file systems without locks it does nothing."""
    global _held
    let_go()
    file = folder / LOCK
    # A pipe would be waited for, and a link lead elsewhere.
    _held = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666), "r+b", buffering=0)
    if not stat.S_ISREG(os.fstat(_held.fileno()).st_mode):
        raise StunError(f"{where}: {file} is not a regular file; remove it")
    try:
        fcntl.flock(_held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StunError(f"{where}: another launch is at work in it; wait for it, or end it") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise


def let_go() -> None:
    """Give up the lock that this process holds, if any."""
    global _held
    if _held:
        _held.close()
    _held = None
