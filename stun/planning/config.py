"""Settings of jobs.plan."""

from dataclasses import dataclass

from omegaconf import MISSING

from stun.config import PruneConfig


@dataclass
class PlanConfig(PruneConfig):
    """Plan from the statistics in the run folder `run_dir`, written to `output`; `compare`: a plan file to compare it with."""

    output: str = MISSING
    compare: str = ""
