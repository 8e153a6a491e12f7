"""Evaluate a checkpoint: torchrun --nproc-per-node 2 -m jobs.evaluate model.path=... task.path=rows.jsonl output=result.json"""

from pathlib import Path

from jobs import launch
from stun.evaluation.job import evaluate
from stun.report.tables import results_table
from stun.run.identity import plain
from stun.tracking.tracker import check_tracking, tracked


def work(cfg, ranks) -> None:
    ranks.on_first(lambda: check_tracking(cfg.tracking))
    with tracked(cfg.tracking, Path(cfg.output).parent, {"evaluate": plain(cfg)}, ranks) as tracking:
        result = evaluate(cfg, ranks)
        tracking.summary = {"evaluate": {name: value for name, value in result.items() if not isinstance(value, list)}}
    ranks.on_first(lambda: print(results_table({cfg.model.path: result})))


def main() -> None:
    launch("evaluate", work, about=__doc__)


if __name__ == "__main__":
    main()
