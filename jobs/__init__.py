"""Entry points. Each composes its configuration with Hydra, starts the ranks, and calls the library."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import datasets
import hydra
import torch
import transformers
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import stun.config
from stun.config import StunError
from stun.ranks import Ranks

CONF = Path(__file__).resolve().parent.parent / "conf"


def launch(name: str, work: Callable[[object, Ranks], None]) -> None:
    """Compose `conf/<name>.yaml` with the command line, start the ranks, and call `work(config, ranks)`.

    Bad input ends in one line on the first rank and exit status 2; what goes wrong on one rank alone in one line there, which
    names the rank and what it was doing. Either way the process ends at once, so that the launcher ends the others.
    """
    stun.config.register()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    # The deepspeed launcher adds an argument that Hydra does not know; the environment says the same.
    sys.argv = [a for a in sys.argv if not a.startswith(("--local_rank", "--local-rank"))]
    is_first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def main(cfg) -> None:
        ranks = None
        try:
            config = OmegaConf.to_object(cfg)
            with Ranks() as ranks:
                work(config, ranks)
        except (StunError, OmegaConfBaseException) as error:
            own = ranks is not None and ranks.doing and not getattr(error, "is_shared", False)
            if is_first or own:
                print(f"error: {_where(ranks) if own else ''}{error}", file=sys.stderr, flush=True)
            _leave(2)
        except (torch.OutOfMemoryError, MemoryError) as error:
            advice = "more ranks, a smaller calibration.micro_batch or a smaller sparsify.gram_gib need less"
            _fail(f"{_where(ranks)}out of memory ({advice}): {error}")
        except RuntimeError as error:
            traceback.print_exc()
            _fail(f"{_where(ranks)}{error}")

    main()


def _where(ranks: Ranks | None) -> str:
    return f"rank {ranks.rank}, {ranks.doing or 'before the first layer'}: " if ranks else ""


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    _leave(1)


def _leave(status: int) -> None:
    """End the process without waiting for threads that read or write."""
    sys.stdout.flush()
    os._exit(status)
