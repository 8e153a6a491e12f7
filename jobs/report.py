"""Compare the runs of a sweep: python -m jobs.report folder=runs/sweep"""

from pathlib import Path

from jobs import launch
from stun.report import runs_in
from stun.table import report_table


def work(cfg, ranks) -> None:
    ranks.on_first(lambda: print(report_table(runs_in(Path(cfg.folder)))))


if __name__ == "__main__":
    launch("report", work)
