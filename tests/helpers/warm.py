"""Starts jobs whose ranks are forks of one process that has imported the package, and that all tests of a run share:
`-m helpers.warm SOCKET OWNER` until the process OWNER has ended, with a third word, `pretend`, for ranks on pretend GPUs
(helpers/pretend).

A launch takes a fraction of a second in place of many for imports on every rank. Ranks are processes with gloo between them all
the same, and see what torchrun would tell them. Launchers themselves are tested in runs/test_world.py and system/test_slurm.py.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

from helpers.paths import ROOT, TESTS

LIMIT = 600.0  # seconds of a launch
GRACE = 30.0  # seconds that the other ranks of a failed one have to end, as under torchrun
_sockets: list[socket.socket] = []  # that ranks must not hold


class WarmProcess:
    """The process that forks, seen from a test. It listens at `address`, and is started there if nothing does yet."""

    def __init__(self, env: dict[str, str], address: Path, owner: int, *kind: str):
        self._process = None
        with open(f"{address}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._connection = _connected(address)
            if not self._connection:
                command = [sys.executable, "-m", "helpers.warm", str(address), str(owner), *kind]
                own = {**env, "PYTHONPATH": str(TESTS)}
                self._process = subprocess.Popen(command, cwd=ROOT, env=own, start_new_session=True)
                while not (connection := _connected(address)):
                    assert self._process.poll() is None, f"the process that starts ranks has ended: {self._process.wait()}"
                    time.sleep(0.05)
                self._connection = connection

    def run(self, script: list[str], ranks: int, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
        """Run what python would be given, `-m MODULE ...` or `FILE ...`, on that many ranks, 0 for a process that no launcher has
        told anything; output goes through files in `folder`."""
        request = {"script": script, "ranks": ranks, "env": env, "folder": str(folder), "cores": sorted(os.sched_getaffinity(0))}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            part = self._connection.recv(100)
            assert part, "the process that starts ranks has ended"
            answer += part
        return subprocess.CompletedProcess(script, int(answer), *((folder / name).read_text() for name in ("stdout", "stderr")))

    def end(self) -> None:
        """For a process of one test alone; a shared one ends with its owner."""
        self._connection.close()
        self._process.terminate()
        self._process.wait()


def _connected(address: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(address))
    except OSError:
        connection.close()
        return None
    return connection


def get_ready() -> None:
    """Before forks: import what jobs import late, read the configuration once, and keep the garbage collector of a fork from
    copying memory."""
    import datasets  # noqa: F401
    import deepspeed.comm  # noqa: F401
    import scipy.cluster.hierarchy
    import scipy.io  # noqa: F401

    import stun.model.arctic
    import stun.report.tables
    import stun.runtime.console  # noqa: F401
    from stun.settings.compose import composed

    composed("prune", ["model.path=model", "calibration.path=text.jsonl", "target=0.5", "run_dir=run"])
    gc.freeze()


def fork_ranks(world: int, become: Callable[[dict[str, str]], NoReturn]) -> list[int]:
    """The processes of a launch. Each calls `become` with what a launcher would put into its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": probe.getsockname()[1]}
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            told = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", **shared}
            become({key: str(value) for key, value in told.items()})
        children.append(child)
    return children


def redirect(**files: Path) -> None:
    """Append what this process writes to `stdout` and `stderr` to these files."""
    for name, file in files.items():
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), {"stdout": 1, "stderr": 2}[name])


def _become_rank(request: dict, told: dict[str, str]) -> NoReturn:
    """Run what python would, and end; without taking the interpreter down, which would copy all of its memory."""
    os.environ.clear()
    os.environ.update({**request["env"], **(told if request["ranks"] else {})})
    redirect(**{name: Path(request["folder"]) / name for name in ("stdout", "stderr")})
    os.close(0)
    for held in _sockets:
        held.close()
    atexit._clear()
    is_module, *words = [request["script"][0] == "-m", *request["script"]]
    sys.argv = words[is_module:]
    code = 1
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(children: list[int]) -> int:
    """The status of the first process that fails, once all have ended; 0 where none does."""
    running, first, deadline = set(children), 0, time.monotonic() + LIMIT
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        running.discard(child)
        code = os.waitstatus_to_exitcode(status) if child else 0
        is_late = time.monotonic() > deadline
        if (code and not first) or is_late:
            first, deadline = first or code or signal.SIGKILL, time.monotonic() + GRACE
            for other in running:
                os.kill(other, signal.SIGKILL if is_late else signal.SIGTERM)
        if not child:
            time.sleep(0.02)
    return first


def _serve(connection: socket.socket) -> NoReturn:
    """Start what one test process asks for, one launch after the other."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _sockets.pop().close()  # the server's: who connects when it has ended must be refused
    _sockets.append(connection)
    with connection.makefile("r") as requests:
        for line in requests:
            request = json.loads(line)
            os.sched_setaffinity(0, request["cores"])
            children = fork_ranks(max(1, request["ranks"]), partial(_become_rank, request))
            connection.sendall(f"{wait(children)}\n".encode())
    os._exit(0)


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):  # the second: another user's by now
        return False
    return True


def main(address: str, owner: str, kind: str = "") -> None:
    from helpers.pretend import device

    if kind:
        device.start()
    import jobs  # noqa: F401
    import stun.pruning.evaluated
    import stun.pruning.push  # noqa: F401

    get_ready()
    if kind:
        device.connect()
    os.dup2(2, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that serve
    with socket.socket(socket.AF_UNIX) as server:
        Path(address).unlink(missing_ok=True)
        server.bind(address)
        server.listen()
        server.settimeout(1)
        _sockets.append(server)
        while _is_there(int(owner)):
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                connection.setblocking(True)
                if os.fork() == 0:
                    _serve(connection)
                connection.close()
    for file in (address, f"{address}.lock"):
        Path(file).unlink(missing_ok=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
