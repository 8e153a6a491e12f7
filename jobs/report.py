"""Compare the runs of a sweep: python -m jobs.report folder=runs/sweep"""

from pathlib import Path

from jobs import launch
from stun.report import runs_in
from stun.table import report_table
from stun.tracking import track_report


def work(cfg, ranks) -> None:
    folder = Path(cfg.folder)
    runs = ranks.on_first(lambda: runs_in(folder))
    ranks.on_first(lambda: print(report_table(runs)))
    for name in runs:
        track_report(folder / name, ranks)


if __name__ == "__main__":
    launch("report", work)
