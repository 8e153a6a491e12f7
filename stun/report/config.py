"""Settings of jobs.report."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class ReportConfig:
    """Report of a run, or of every run below a folder with a page that compares them."""

    folder: str = MISSING
    """Folder of a run, or of several."""
