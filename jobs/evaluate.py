"""Evaluate a checkpoint: torchrun --nproc-per-node 2 -m jobs.evaluate model.path=... task.path=rows.jsonl output=result.json"""

from jobs import launch


def work(cfg, ranks) -> None:
    from stun.evaluation.job import evaluate_tracked
    from stun.report.tables import results_table

    result = evaluate_tracked(cfg, ranks)
    ranks.on_first(lambda: print(results_table({cfg.model.path: result})))


if __name__ == "__main__":
    launch("evaluate", work, __doc__)
