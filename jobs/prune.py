"""Prune a checkpoint: torchrun --nproc-per-node 8 -m jobs.prune model.path=... calibration.path=... target=0.4 run_dir=runs/x"""

import shutil
import sys

from jobs import launch
from stun.prune import prune, take_statistics
from stun.table import summary_table


def work(cfg, ranks) -> None:
    summary = prune(cfg, ranks)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    ranks.on_first(lambda: print("\n" + summary_table(summary, cfg.run_dir, width)))


if __name__ == "__main__":
    launch("prune", work, take_statistics)
