"""The runs of a family that family_checks.py looks at; as a program, one of every family: -m helpers.family_runs SOURCES RUNS
[family ...]"""

from __future__ import annotations

import sys
from pathlib import Path

from helpers.paths import TEXT
from stun.config import CalibrationConfig, ExpertsConfig, ModelConfig, PruneConfig, Scope, SparsifyConfig
from stun.pruning.job import prune
from stun.runtime.ranks import Ranks

CALIBRATION = CalibrationConfig(path=str(TEXT), samples=13, length=40, micro_batch=2)
FAMILY = CalibrationConfig(path=str(TEXT), samples=7, length=32, micro_batch=2)
RUNS = {
    "identity": {"target": 0.0},
    "experts": {"target": 0.25, "experts": ExpertsConfig(fraction=1.0)},
    "both": {"target": 0.4},
}


def run(name: str, source: Path, run_dir: Path, ranks: Ranks, calibration: CalibrationConfig = CALIBRATION) -> dict:
    """One run of `RUNS`: nothing to prune, whole experts only, or both."""
    request = RUNS[name]
    if name == "experts":
        request = {**request, "sparsify": SparsifyConfig(scope=[]), "target": target_of_two(source)}
    return prune(PruneConfig(ModelConfig(str(source)), calibration, run_dir=str(run_dir), **request), ranks)


def target_of_two(source: Path) -> float:
    """The sparsity at which exactly two experts of every layer leave."""
    from stun.checkpoint.reader import Checkpoint
    from stun.model.architecture import Architecture
    from stun.planning.budget import measure_layers

    sizes = measure_layers(Architecture(Checkpoint.open(source)), list(Scope))
    return 2 * sum(size.expert for size in sizes) / sum(size.total for size in sizes)


if __name__ == "__main__":
    sources, runs = map(Path, sys.argv[1:3])
    with Ranks() as ranks:
        for family in sys.argv[3:]:
            run("both", sources / family, runs / family / "both", ranks, FAMILY)
