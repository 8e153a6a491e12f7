"""Evaluate a checkpoint: torchrun --nproc-per-node 2 -m jobs.evaluate model.path=... task.path=rows.jsonl output=result.json"""

from pathlib import Path

from jobs import launch
from stun.checkpoint import write_json
from stun.evaluate import evaluate
from stun.table import results_table


def work(cfg, ranks) -> None:
    result = evaluate(cfg.model.path, cfg.task, ranks)

    def report() -> None:
        Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(cfg.output), result)
        print(results_table({cfg.model.path: result}))

    ranks.on_first(report)


if __name__ == "__main__":
    launch("evaluate", work)
