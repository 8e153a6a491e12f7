"""Write report pages, for one run or for all runs below a folder and their comparison: python -m jobs.report folder=runs/sweep"""

from pathlib import Path

from jobs import launch
from stun.report.write import describe, write_reports
from stun.tracking.tracker import track_report


def work(cfg, ranks) -> None:
    folder = Path(cfg.folder)
    pages = ranks.on_first(lambda: write_reports(folder))
    ranks.on_first(lambda: print(describe(folder, pages)))
    for page in pages:
        track_report(page.parent.parent, ranks)


def main() -> None:
    launch("report", work, about=__doc__)


if __name__ == "__main__":
    main()
