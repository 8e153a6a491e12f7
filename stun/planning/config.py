"""Settings of jobs.plan."""

from dataclasses import dataclass

from omegaconf import MISSING

from stun.config import PruneConfig


@dataclass
class PlanConfig(PruneConfig):
    """Plan from the statistics in the run folder `run_dir`."""

    output: str = MISSING
    """Plan file to write."""
    compare: str = ""
    """Plan file to compare it with."""
