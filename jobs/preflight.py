"""Say what a run needs and whether it is there: python -m jobs.preflight model.path=... target=0.4 run_dir=runs/x cluster.nodes=8
cluster.gpus=8"""

from jobs import launch
from stun.preflight import preflight
from stun.request import open_job


def work(cfg, ranks) -> None:
    preflight(open_job(cfg), ranks, cfg.cluster)


if __name__ == "__main__":
    launch("preflight", work)
