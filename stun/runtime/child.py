"""Work that files from elsewhere decide, in a fork of this process whose memory and time are bounded.

A chat template is a program, and a tokenizer's file can make its library abort: neither may end or stop the job.
"""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stun.config import one_line

SECONDS, GIB = 60, 4  # of computing one answer; of memory beside what this process has
_WAIT = 10  # times as many seconds pass at most: a machine may be busy


class Ended(Exception):
    """What the child was asked for fails there; the message says how."""


@contextmanager
def child(function: Callable[[object], object]) -> Iterator[Callable[[object], object]]:
    """Context with a function that has `function(request)` answered by a fork of this process, begun with the first request.
    Requests and answers are pickled. It raises Ended."""
    own, theirs = multiprocessing.Pipe()
    process = 0

    def ask(request: object) -> object:
        nonlocal process
        if not process:
            process = os.fork()
            if not process:
                own.close()
                _answer(function, theirs)
            theirs.close()
        try:
            own.send(request)
            answer, reason = own.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise Ended(f"it takes more than {SECONDS} seconds or {GIB} GiB, or ends its process") from None
        if reason:
            raise Ended(reason)
        return answer

    try:
        yield ask
    finally:
        own.close()
        if process:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _answer(function: Callable[[object], object], pipe) -> None:
    """Answer until the pipe is closed. The timers' signals end this process, whatever it does."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries print what they die of
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        for number in (signal.SIGALRM, signal.SIGVTALRM):
            signal.signal(number, signal.SIG_DFL)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIB * 2**30, hard))
        while True:
            request = pipe.recv()
            signal.alarm(_WAIT * SECONDS)
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            pipe.send(_outcome(function, request))
    finally:
        os._exit(0)


def _outcome(function: Callable[[object], object], request: object) -> tuple[object, str]:
    """Answer, and why there is none."""
    try:
        return function(request), ""
    except BaseException as error:  # a panic in Rust is no Exception
        return None, one_line(error)
