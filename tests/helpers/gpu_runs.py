"""The runs of tests/gpu, on whatever device the ranks have, in one launch: -m helpers.gpu_runs SOURCES RUNS CASE ...

A case is `families`, `methods`, `refits`, `evaluate` or `resume`. Each rank writes to RUNS/rank-R.json on which GPUs it had
a context, by which threads, and the names of the collectives it has called, by case.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from helpers.paths import HELDOUT, TEXT
from helpers.pretend import records
from helpers.stops import stopped_after
from stun.config import (
    Budget,
    CalibrationConfig,
    Dropped,
    ExpertsConfig,
    ExpertsMethod,
    ModelConfig,
    Precision,
    PruneConfig,
    Score,
    SparsifyConfig,
)
from stun.config import SparsifyMethod as Method
from stun.evaluation.config import EvaluateConfig, TaskConfig
from stun.evaluation.job import evaluate
from stun.pruning.job import prune
from stun.runtime.ranks import Ranks

CALIBRATION = CalibrationConfig(path=str(TEXT), samples=5, length=12, micro_batch=2)
FAMILY = "mixtral"  # of the cases that need one
SHALLOW = "shallow"
REFITTED = (FAMILY, "deepseek_v4", "gemma4", "nemotron_h")
METHODS = {
    "owl": SparsifyConfig(method=Method.moe_pruner, ratios="owl"),
    "sparsegpt": SparsifyConfig(method=Method.sparsegpt, pattern="2:4"),
    "alps": SparsifyConfig(method=Method.alps, reconstruct=True),
    "pattern": SparsifyConfig(pattern="2:4"),
}


def request(source: Path, run_dir: Path, sparsify: SparsifyConfig | None = None) -> PruneConfig:
    """Experts and weights removed, by the paper's methods where no other is given; fp8 in float32, as some CPUs do."""
    experts = ExpertsConfig(fraction=0.4)
    if sparsify:
        experts = replace(experts, method=ExpertsMethod.rank, budget=Budget["global"])
    target = 0.55 if sparsify and sparsify.pattern else 0.4
    cfg = PruneConfig(ModelConfig(str(source)), CALIBRATION, experts, sparsify or SparsifyConfig(), target, str(run_dir))
    return replace(cfg, precision=Precision.float32) if source.name == "fp8" else cfg


def families(sources: Path, runs: Path, ranks: Ranks) -> None:
    """Every family in SOURCES but those of the joint refit alone."""
    others = {*REFITTED, SHALLOW} - {FAMILY}
    for source in sorted(source for source in sources.iterdir() if source.name not in others):
        prune(request(source, runs / source.name), ranks)


def methods(sources: Path, runs: Path, ranks: Ranks) -> None:
    """On a model of few layers, since each operation is slow on pretend GPUs."""
    for name, sparsify in METHODS.items():
        prune(request(sources / SHALLOW, runs / name, sparsify), ranks)


def refits(sources: Path, runs: Path, ranks: Ranks) -> None:
    """The joint refit, beside removed weights and novices, and where layers do more with their experts' output."""
    for name in REFITTED:
        dropped = Dropped.novice if name == FAMILY else Dropped.reroute
        experts = ExpertsConfig(ExpertsMethod.rank, fraction=0.5, score=Score.residual, dropped=dropped, refit=True)
        prune(replace(request(sources / name, runs / name), experts=experts), ranks)


def resume(sources: Path, runs: Path, ranks: Ranks) -> None:
    """An interrupted run."""
    prune_with_stops(request(sources / FAMILY, runs / "stopped"), ranks)


def prune_with_stops(cfg: PruneConfig, ranks: Ranks) -> None:
    """A run that ends in the first stream, then in the second, and goes on."""
    with stopped_after("observe", 1):
        prune(cfg, ranks)
    with stopped_after("prune", 0):
        prune(cfg, ranks)
    prune(cfg, ranks)


def evaluated(sources: Path, runs: Path, ranks: Ranks) -> None:
    """Completions and perplexity of a dense model."""
    evaluate_briefly(sources / FAMILY, runs, ranks)


def evaluate_briefly(model: Path, runs: Path, ranks: Ranks) -> dict:
    """Result of a few completions and of the perplexity of a short text, in RUNS/result.json too."""
    rows = runs / "rows.jsonl"
    ranks.on_first(lambda: rows.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:5])))
    text = replace(CALIBRATION, samples=3)
    task = TaskConfig(path=str(rows), max_new_tokens=4, batch=2)
    return evaluate(EvaluateConfig(ModelConfig(str(model)), task, text, output=str(runs / "result.json")), ranks)


CASES = {"families": families, "methods": methods, "refits": refits, "resume": resume, "evaluate": evaluated}


def main(sources: str, runs: str, *names: str) -> None:
    called = {}
    with Ranks() as ranks:
        ranks.log = lambda message: None
        for name in names:
            records.COLLECTIVES.clear()
            folder = Path(runs) / name
            folder.mkdir(parents=True, exist_ok=True)
            CASES[name](Path(sources), folder, ranks)
            called[name] = [line.split()[0] for line in records.COLLECTIVES]
        contexts = {number: sorted(threads) for number, threads in records.CONTEXTS.items()}
        found = {"device": str(ranks.device), "contexts": contexts, "collectives": called}
        (Path(runs) / f"rank-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
