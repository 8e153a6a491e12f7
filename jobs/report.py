"""A page for a run, or for every run below a folder and one that compares them: python -m jobs.report folder=runs/sweep"""

from pathlib import Path

from jobs import launch
from stun.report.write import report


def work(cfg, ranks) -> None:
    ranks.on_first(lambda: print(report(Path(cfg.folder))))


if __name__ == "__main__":
    launch("report", work)
