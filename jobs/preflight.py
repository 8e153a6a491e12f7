"""Check the memory, disk and time that a run needs: python -m jobs.preflight model.path=... target=0.4 run_dir=runs/x
cluster.nodes=8 cluster.gpus=8"""

from jobs import launch


def work(cfg, ranks) -> None:
    from stun.planning.job import resolve
    from stun.preflight.job import preflight
    from stun.pruning.evaluated import check_task
    from stun.pruning.push import check_push

    check_push(cfg, ranks)
    job = resolve(cfg, ranks, runs_here=not cfg.cluster.nodes)
    if not cfg.task.path or ranks.on_first(lambda: job.arch.source.is_here):  # or weights would be fetched for it
        check_task(cfg, ranks)
    preflight(job, ranks, cfg.cluster)


if __name__ == "__main__":
    launch("preflight", work, __doc__)
