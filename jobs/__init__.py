"""Entry points. Each one composes its configuration with Hydra, starts the ranks, and calls the library."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import stun  # noqa: F401  # isort: skip  (before torch: it sets how OpenMP's threads wait)
import hydra
import torch
import transformers
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stun.api.compose import CONF, register
from stun.config import StunError
from stun.run.sweep import stages
from stun.runtime.ranks import Ranks, process_ranks
from stun.stream.progress import close_view

Work = Callable[[object, Ranks], None]


def launch(name: str, work: Work, observe: Work | None = None) -> None:
    """Compose `conf/<name>.yaml` with the command line, start the ranks, and call `work(config, ranks)`.

    With `-m`, `work` is called for every run of a sweep, after `observe`, if given, for the statistics they share
    (stun.run.sweep). Bad input prints one line on the first rank; an error on one rank alone prints one line there, with the
    rank and the step. Both exit with status 2, other errors with 1, at once, so that the launcher ends the other ranks.
    """
    register()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read on import, in stun.data
    transformers.utils.logging.disable_progress_bar()
    # The deepspeed launcher adds an argument that Hydra does not know; the environment gives the rank as well.
    program, *arguments = (a for a in sys.argv if not a.startswith(("--local_rank", "--local-rank")))
    parts = [(work, arguments)]
    if observe and {"-m", "--multirun"} & set(arguments):
        with _ends_clearly():
            parts = list(zip((observe, work), stages(arguments), strict=True))
    for function, overrides in parts:
        sys.argv = [program, *overrides]
        _main(name, function)()


def _main(name: str, work: Work) -> Callable[[], None]:
    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def main(cfg) -> None:
        with _ends_clearly():
            work(OmegaConf.to_object(cfg), process_ranks())

    return main


@contextmanager
def _ends_clearly() -> Iterator[None]:
    """End the process with one line on stderr if the work inside raises."""
    is_first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    try:
        try:
            yield
        finally:
            close_view()  # before anything else is printed
    except (StunError, OmegaConfBaseException, HydraException) as error:
        is_local = _doing() and not getattr(error, "is_shared", False)
        if is_first or is_local:
            print(f"error: {_where() if is_local else ''}{error}", file=sys.stderr, flush=True)
        _exit(2)
    except Exception as error:
        if _is_out_of_memory(error):
            advice = "more ranks, a smaller calibration.micro_batch, task.batch or sparsify.gram_gib need less"
            _fail(f"{_where()}out of memory ({advice}): {error}")
        traceback.print_exc()
        _fail(f"{_where()}{error}")


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the GPU, Python, torch's CPU allocator or the kernel ran out; the last two have no error type of their own."""
    is_kernel = isinstance(error, OSError) and error.errno == errno.ENOMEM
    is_allocator = any(words in str(error) for words in ("not enough memory", "can't allocate memory"))
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or is_kernel or is_allocator


def _doing() -> str:
    return process_ranks().doing if process_ranks.cache_info().currsize else ""


def _where() -> str:
    return f"rank {process_ranks().rank}, {_doing() or 'before the first layer'}: " if process_ranks.cache_info().currsize else ""


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    _exit(1)


def _exit(status: int) -> None:
    """End the process without waiting for threads that read or write."""
    sys.stdout.flush()
    os._exit(status)
