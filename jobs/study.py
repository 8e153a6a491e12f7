"""Compare ways to prune: torchrun --nproc-per-node 2 -m jobs.study scores=docs/selection.json (or --config-name study_weights)"""

from pathlib import Path

from jobs import launch
from stun.files import write_json


def work(cfg, ranks) -> None:
    from stun.benchmark.study import markdown, study

    scores = study(cfg, ranks)

    def report() -> None:
        print(markdown(scores, cfg.measures))
        if cfg.scores:
            Path(cfg.scores).parent.mkdir(parents=True, exist_ok=True)
            write_json(Path(cfg.scores), scores)

    ranks.on_first(report)


if __name__ == "__main__":
    launch("study", work, __doc__)
