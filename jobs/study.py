"""Compare ways to choose experts: torchrun --nproc-per-node 2 -m jobs.study experiment=study table=docs/selection.md"""

from pathlib import Path

from jobs import launch
from stun.study import study


def work(cfg, ranks) -> None:
    table = study(cfg, ranks)

    def report() -> None:
        print(table)
        if cfg.table:
            Path(cfg.table).write_text(table)

    ranks.on_first(report)


if __name__ == "__main__":
    launch("study", work)
