"""Configurations as Hydra composes them."""

from __future__ import annotations

from hydra import compose, initialize_config_dir

from helpers.paths import ROOT
from stun.settings.compose import register


def composed(job: str, overrides: list[str]):
    register(job.partition("_")[0])  # study_weights has the schema of study
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(job, overrides)
