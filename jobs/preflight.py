"""Say what a run needs and whether it is there: python -m jobs.preflight model.path=... target=0.4 run_dir=runs/x cluster.nodes=8
cluster.gpus=8; or, with 'cluster.worlds=[1,8,64]', what it would need on each of so many GPUs"""

from jobs import launch
from stun.planning.job import resolve
from stun.preflight.job import preflight
from stun.preflight.worlds import worlds


def work(cfg, ranks) -> None:
    job = resolve(cfg, ranks)
    if cfg.cluster.worlds:
        worlds(job, ranks, cfg.cluster)
    else:
        preflight(job, ranks, cfg.cluster)


if __name__ == "__main__":
    launch("preflight", work)
