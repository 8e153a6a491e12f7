"""A step in a process of its own, which may hang or crash."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from gpu.acceptance.rows import NeedsGPU, Row
from helpers.warm import redirect

_NEEDS_GPU = 77  # exit status
_GRACE = 10.0  # seconds after SIGKILL, in which a driver may hold a process
_SHOWN = 3000  # characters at both ends of a failed step's output


def run_child(step: Callable[[], Iterable[Row]], folder: Path, limit: float) -> dict:
    """Outcome of a step in a fork of this process: `status`, `seconds`, the `rows` found, and the end of its output as `error`
    unless it went well. After `limit` seconds it is killed, with all that it has started. Files go to `folder`."""
    started, (rows, log) = time.monotonic(), (folder / "rows", folder / "log")
    child = os.fork()
    if child == 0:
        _become(step, rows, log, 0.9 * limit)
    status = _ended(child, limit)
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []
    outcome = {"status": _named(status, found), "seconds": time.monotonic() - started, "rows": found}
    if outcome["status"] == "ok":
        return outcome
    output = log.read_text(errors="replace").partition("\nExtension modules:")[0] if log.is_file() else ""
    return outcome | {"error": _shortened(output.strip()) or f"status {status}"}


def _shortened(text: str) -> str:
    """Both ends: a crash says first where it was, an exception last."""
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}\n...\n{text[-_SHOWN:]}"


def _become(step: Callable[[], Iterable[Row]], rows: Path, log: Path, patience: float) -> NoReturn:
    """Write down every row as it is found, and end without the clean-up of the process that this one is a fork of. After
    `patience` seconds, and in a crash, the log gets the place that was reached."""
    code = 1
    try:
        os.setsid()
        redirect(stdout=log, stderr=log)
        sys.stdout = sys.stderr = log.open("a", buffering=1)
        faulthandler.enable()
        faulthandler.dump_traceback_later(patience)
        with rows.open("w") as file:
            for row in step():
                print(json.dumps(asdict(row)), file=file, flush=True)
        code = 0
    except NeedsGPU as reason:
        print(reason)
        code = _NEEDS_GPU
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _ended(child: int, limit: float) -> int | None:
    """Exit status of a child, minus the signal that ended it; None if it had to be killed."""
    try:
        return _wait(child, limit)
    finally:
        with suppress(ProcessLookupError):  # what it has started, and itself if it is still there
            os.killpg(child, signal.SIGKILL)


def _wait(child: int, limit: float) -> int | None:
    deadline, killed = time.monotonic() + limit, False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return None if killed else os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            if killed:
                return None
            os.killpg(child, signal.SIGKILL)
            deadline, killed = time.monotonic() + _GRACE, True
        time.sleep(0.05)


def _named(status: int | None, found: list[dict]) -> str:
    if status is None:
        return "timed out"
    if status == _NEEDS_GPU:
        return "needs a GPU"
    if status < 0:
        return f"ended by signal {-status}"
    return "ok" if status == 0 and all(row["is_right"] for row in found) else "failed"
