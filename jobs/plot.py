"""Draw comparisons of several targets: python -m jobs.plot comparisons='[runs/a/comparison.json,...]' output=comparison.png"""

from jobs import launch
from stun.report.figure import comparison_figure


def work(cfg, ranks) -> None:
    ranks.on_first(lambda: comparison_figure(cfg.comparisons, cfg.output))


if __name__ == "__main__":
    launch("plot", work)
