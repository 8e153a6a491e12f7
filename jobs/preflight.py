"""Check the memory, disk and time that a run needs: python -m jobs.preflight model.path=... target=0.4 run_dir=runs/x
cluster.nodes=8 cluster.gpus=8"""

from jobs import launch


def work(cfg, ranks) -> None:
    from stun.planning.job import resolve
    from stun.preflight.job import preflight
    from stun.pruning.push import check_push

    check_push(cfg, ranks)
    preflight(resolve(cfg, ranks, runs_here=not cfg.cluster.nodes), ranks, cfg.cluster)


if __name__ == "__main__":
    launch("preflight", work, __doc__)
