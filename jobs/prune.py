"""Prune a checkpoint: torchrun --nproc-per-node 8 -m jobs.prune model.path=... calibration.path=... target=0.4 run_dir=runs/x"""

from jobs import launch
from stun.prune import prune


def work(cfg, ranks) -> None:
    prune(cfg, ranks)


if __name__ == "__main__":
    launch("prune", work)
