"""Entry points. Each composes its configuration with Hydra, starts the ranks, and calls the library."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import hydra
import transformers
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import stun.config
from stun.config import StunError
from stun.ranks import Ranks

CONF = Path(__file__).resolve().parent.parent / "conf"


def launch(name: str, work: Callable[[object, Ranks], None]) -> None:
    """Compose `conf/<name>.yaml` with the command line, start the ranks, and call `work(config, ranks)`.

    Bad input ends in one line on the first rank and exit status 2.
    """
    stun.config.register()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    # The deepspeed launcher adds an argument that Hydra does not know; the environment says the same.
    sys.argv = [a for a in sys.argv if not a.startswith(("--local_rank", "--local-rank"))]
    is_first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def main(cfg) -> None:
        try:
            config = OmegaConf.to_object(cfg)
            with Ranks() as ranks:
                work(config, ranks)
        except (StunError, OmegaConfBaseException) as error:
            if is_first:
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    main()
