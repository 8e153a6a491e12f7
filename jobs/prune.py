"""Prune a checkpoint: torchrun --nproc-per-node 8 -m jobs.prune model.path=... calibration.path=... target=0.4 run_dir=runs/x
[task.path=rows.jsonl]"""

from jobs import launch


def work(cfg, ranks) -> None:
    from stun.pruning.evaluated import prune_then_evaluate
    from stun.pruning.push import check_push, push
    from stun.report.tables import results_table, summary_table

    check_push(cfg, ranks)
    summary, results = prune_then_evaluate(cfg, ranks)
    if results:
        ranks.on_first(lambda: print("\n" + results_table(results), end=""))
    ranks.on_first(lambda: print("\n" + summary_table(summary, cfg.run_dir)))
    push(cfg, ranks)


def observe(cfg, ranks) -> None:
    from stun.pruning.evaluated import prepare_sweep

    prepare_sweep(cfg, ranks)


if __name__ == "__main__":
    launch("prune", work, __doc__, observe)
