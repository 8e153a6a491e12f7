"""A small request for plans, of which tests change a part."""

from __future__ import annotations

from dataclasses import replace

from helpers.paths import TEXT
from stun.config import CalibrationConfig, ExpertsConfig, ModelConfig, PruneConfig

CALIBRATION = CalibrationConfig(path=str(TEXT), samples=8, length=40, micro_batch=2)


def config(source, run_dir, target=0.4, experts=None, **changes) -> PruneConfig:
    experts = experts or ExpertsConfig()
    base = PruneConfig(ModelConfig(str(source)), CALIBRATION, experts, target=target, run_dir=str(run_dir))
    return replace(base, **changes)
