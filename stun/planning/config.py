"""Settings of jobs.plan."""

from dataclasses import dataclass, fields

from omegaconf import MISSING

from stun.config import PruneConfig


@dataclass
class PlanConfig(PruneConfig):
    """Plan from the statistics in the run folder `run_dir`."""

    output: str = MISSING
    """Plan file to write."""
    compare: str = ""
    """Plan file to compare it with."""


def request(cfg: PlanConfig) -> PruneConfig:
    """The run that the plan is for; its `output` is the form of a checkpoint, and not the plan's file."""
    return PruneConfig(**{field.name: getattr(cfg, field.name) for field in fields(PruneConfig) if field.name != "output"})
