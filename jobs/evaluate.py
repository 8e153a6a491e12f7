"""Evaluate a checkpoint: torchrun --nproc-per-node 2 -m jobs.evaluate model.path=... task.path=rows.jsonl output=result.json"""

from jobs import launch
from stun.evaluate import evaluate
from stun.table import results_table


def work(cfg, ranks) -> None:
    result = evaluate(cfg, ranks)
    ranks.on_first(lambda: print(results_table({cfg.model.path: result})))


if __name__ == "__main__":
    launch("evaluate", work)
