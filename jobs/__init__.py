"""Entry points. Each one composes its configuration with Hydra, starts the ranks, and calls the library.

What computes is imported when it is called: torch and transformers take seconds, which help and refused settings need not wait.
"""

import signal
import sys

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The imports below take a moment, in which Ctrl-C would end `python -m jobs.prune` in a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stun.config import Device, StunError, printable
from stun.files import system_errors
from stun.planning.validation import validate
from stun.run.sweep import runs, stages
from stun.runtime.imports import hide_kernels
from stun.runtime.interrupts import interruptible
from stun.runtime.process import process_ranks, started_ranks
from stun.settings.compose import CONF, check_overrides, composed, register
from stun.settings.describe import help_text
from stun.stream.progress import close_view, reached

if TYPE_CHECKING:
    from stun.runtime.ranks import Ranks

Work = Callable[[object, "Ranks"], None]
# Seconds in which the launcher ends a rank, once another has failed: after errors that all ranks raise, and after other ones.
ALIKE, OWN = 10.0, 2.0
_DETAIL = re.compile(r"\s*(full_key|reference_type|object_type|To append to your config|Config search path|provider=|$)")
_gives_way = False  # whether the launcher is expected to end this rank


def launch(name: str, work: Work, about: str, observe: Work | None = None) -> None:
    """Compose `conf/<name>.yaml` with the command line, start the ranks, and call `work(config, ranks)`.

    `--help` begins with `about`. With `-m`, `work` is called for every run of a sweep, after `observe`, if given, for what they
    share (stun.run.sweep). Bad input prints one line on the first rank; an error on one rank alone prints one line there, with
    the rank and the step. Both exit with status 2, other errors with 1, so that the launcher ends the other ranks. Ctrl-C and
    SIGTERM print one line on the first rank and exit with 130 and 143.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read on import, in stun.data
    hide_kernels()
    # The deepspeed launcher adds an argument that Hydra does not know; the environment gives the rank as well.
    program, *arguments = (a for a in sys.argv if not a.startswith(("--local_rank", "--local-rank")))
    flags, overrides = [a for a in arguments if a.startswith("-")], [a for a in arguments if not a.startswith("-")]
    if {"-h", "--help"} & set(flags):
        print(help_text(name, about))
    elif flags:
        _launch_by_hydra(name, [program, *arguments], overrides, work, observe)
    else:
        with _ends_clearly():
            _start(work, composed(name, overrides))


def _launch_by_hydra(name: str, argv: list[str], words: list[str], work: Work, observe: Work | None) -> None:
    """A sweep (`-m`), or another flag of Hydra's, such as `--cfg job`, `--config-name NAME` or one for a shell's completion."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, which are printed like others
    program, *arguments = argv
    is_sweep = bool({"-m", "--multirun"} & set(arguments))
    register(name)
    parts = [(work, arguments)]
    with _ends_clearly():
        if is_sweep:
            check_overrides(name, words, is_sweep)
        if is_sweep and observe:
            _check_runs(name, words)
            parts = list(zip((observe, work), stages(arguments), strict=True))
    for function, overrides in parts:
        sys.argv = [program, *overrides]
        with _ends_clearly():
            _main(name, function)()


def _check_runs(name: str, words: list[str]) -> None:
    """Raises StunError, before the statistics are taken, for a run of the sweep that no model could make."""
    for run in runs(words):
        # Without the paths that only Hydra's multirun can resolve.
        own = [word for word in run if not word.startswith(("hydra", "launcher=", "run_dir=", "statistics=", "dense="))]
        validate(composed(name, [*own, "run_dir=run"]))


def _main(name: str, work: Work) -> Callable[[], None]:
    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def main(cfg) -> None:
        with _ends_clearly():
            _start(work, OmegaConf.to_object(cfg))

    return main


def _start(work: Work, cfg: object) -> None:
    ranks = process_ranks(getattr(cfg, "device", Device.cpu))  # a job without that setting computes nothing
    from transformers.utils import logging

    logging.disable_progress_bar()
    with system_errors():
        work(cfg, ranks)
        sys.stdout.flush()


@contextmanager
def _ends_clearly() -> Iterator[None]:
    """End the process with one line on stderr if the work inside raises or is interrupted."""
    with interruptible(_interrupted):
        try:
            try:
                yield
            finally:
                close_view()  # before anything else is printed
        except (StunError, OmegaConfBaseException, HydraException) as error:
            is_alike = not _doing() or getattr(error, "is_shared", False)
            _give_way(ALIKE if is_alike else OWN)
            _fail(f"{'' if is_alike and _is_first() else _where()}{_line(error)}", 2)
        except Exception as error:
            from stun.runtime.gpus import is_out_of_memory
            from stun.runtime.ranks import is_lost

            if is_lost(error):
                time.sleep(ALIKE)  # the rank that ended first says why, or the launcher does
            _give_way(OWN)
            if is_out_of_memory(error):
                advice = "more ranks, a smaller calibration.micro_batch, task.batch, batch or sparsify.gram_gib need less"
                _fail(f"{_where()}out of memory ({advice}): {error}", 1)
            traceback.print_exc()
            _fail(f"{_where()}{error}", 1)


def _is_first() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _give_way(seconds: float) -> None:
    """Wait, except on the first rank, whose launcher ends this one if it has failed too: what both raise is printed once."""
    global _gives_way
    if not _is_first():
        _gives_way = True
        time.sleep(seconds)


def _interrupted(number: int) -> None:
    """End the process after a signal, in one line on the first rank."""
    if _gives_way:
        os._exit(0)  # torchrun lists no rank that ends with 0
    close_view()
    if _is_first():
        place = reached() or (f"({_doing()})" if _doing() else "before the first layer")
        print(f"interrupted {place}; the same command continues", file=sys.stderr, flush=True)
    _exit(128 + number)


def _line(error: Exception) -> str:
    """Message on one line. Hydra gives the reason in the error behind its own."""
    errors = [error, error.__cause__] if isinstance(error, HydraException) and error.__cause__ else [error]
    shown = [[line.strip() for line in str(each).splitlines() if not _DETAIL.match(line)] for each in errors]
    return ": ".join(" ".join(lines).rstrip(".") for lines in shown)


def _doing() -> str:
    ranks = started_ranks()
    return ranks.doing if ranks else ""


def _where() -> str:
    ranks = started_ranks()
    return f"rank {ranks.rank}, {ranks.doing or 'before the first layer'}: " if ranks else ""


def _fail(message: str, status: int) -> None:
    with suppress(OSError):  # nobody reads it, or its disk is full
        print(f"error: {printable(message)}", file=sys.stderr, flush=True)
    _exit(status)


def _exit(status: int) -> None:
    """End the process without waiting for threads that read or write."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status)
