"""Prune a checkpoint: torchrun --nproc-per-node 8 -m jobs.prune model.path=... calibration.path=... target=0.4 run_dir=runs/x"""

from jobs import launch
from stun.pruning.job import prune, take_statistics
from stun.pruning.push import check_push, push
from stun.report.tables import summary_table


def work(cfg, ranks) -> None:
    check_push(cfg, ranks)
    summary = prune(cfg, ranks)
    ranks.on_first(lambda: print("\n" + summary_table(summary, cfg.run_dir)))
    push(cfg, ranks)


if __name__ == "__main__":
    launch("prune", work, take_statistics)
