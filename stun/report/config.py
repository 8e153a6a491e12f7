"""Settings of jobs.report."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class ReportConfig:
    """Report of the run in `folder`, or of every run below it with a page that compares them."""

    folder: str = MISSING
