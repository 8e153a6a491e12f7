"""Write report pages, for one run or for all runs below a folder and their comparison: python -m jobs.report folder=runs/sweep"""

from pathlib import Path

from jobs import launch


def work(cfg, ranks) -> None:
    from stun.report.write import report
    from stun.tracking.tracker import track_report

    pages, text = ranks.on_first(lambda: report(Path(cfg.folder)))
    ranks.on_first(lambda: print(text))
    for page in pages:
        track_report(page.parent.parent, ranks)


if __name__ == "__main__":
    launch("report", work, __doc__)
