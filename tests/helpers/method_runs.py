"""Ways to remove single weights, one run each, in one launch: -m helpers.method_runs SOURCE RUNS NAME ...

Ranks share four cores, whatever there are: one has four threads, of two each has two.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from helpers.paths import TEXT
from stun.config import (
    Budget,
    CalibrationConfig,
    Dropped,
    ExpertsConfig,
    ExpertsMethod,
    ModelConfig,
    PruneConfig,
    Score,
    SparsifyConfig,
)
from stun.config import SparsifyMethod as Method
from stun.pruning.job import prune
from stun.runtime.ranks import Ranks

CALIBRATION = CalibrationConfig(path=str(TEXT), samples=9, length=48, micro_batch=2)
TINY = 1e-6  # GiB: experts are measured one at a time
TARGET = 0.5
OBSERVED = "owl"  # the run that takes the statistics, with those of outliers, which all others share
METHODS = {
    OBSERVED: SparsifyConfig(ratios="owl"),
    **{method.name: SparsifyConfig(method=method) for method in Method},
    "sparsegpt blocked": SparsifyConfig(method=Method.sparsegpt, gram_gib=TINY),
    "reconstruct": SparsifyConfig(reconstruct=True, gram_gib=TINY),
    "refit": SparsifyConfig(),
    "novices": SparsifyConfig(),
    "novices refitted": SparsifyConfig(),
    "everything": SparsifyConfig(method=Method.alps, reconstruct=True, ratios="owl"),
    **{f"2:4 {method.name}": SparsifyConfig(method=method, pattern="2:4") for method in Method},
    "1:4 everything": SparsifyConfig(method=Method.sparsegpt, pattern="1:4", reconstruct=True),
}
REFITTED = ("refit", "novices refitted", "everything")  # jointly


def request(source: str, run_dir: Path, name: str) -> PruneConfig:
    """The run of `METHODS` with that name."""
    how = METHODS[name]
    target = {"": TARGET, "2:4": 0.6, "1:4": 0.8}[how.pattern]
    dropped = Dropped.novice if name.startswith("novices") else Dropped.reroute
    score = Score.residual if name in (OBSERVED, "novices refitted") else Score.reap
    experts = ExpertsConfig(ExpertsMethod.rank, budget=Budget["global"], score=score, dropped=dropped, refit=name in REFITTED)
    shared = "" if name == OBSERVED else str(run_dir / OBSERVED)
    return PruneConfig(ModelConfig(source), CALIBRATION, experts, how, target, str(run_dir / name), statistics=shared)


if __name__ == "__main__":
    os.sched_getaffinity = lambda process: set(range(4))
    with Ranks() as ranks:
        for name in sys.argv[3:]:
            prune(request(sys.argv[1], Path(sys.argv[2]), name), ranks)
