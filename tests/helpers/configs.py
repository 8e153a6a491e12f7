"""Configurations as Hydra composes them."""

from __future__ import annotations

from hydra import compose, initialize_config_dir

import jobs
from helpers.paths import ROOT


def composed(job: str, overrides: list[str]):
    jobs.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(job, overrides)
