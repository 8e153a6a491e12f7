"""The three runs of every family that test_families.py looks at, in one launch: -m helpers.family_runs SOURCES RUNS [family
...]"""

from __future__ import annotations

import sys
from pathlib import Path

from helpers.paths import TEXT
from stun.config import CalibrationConfig, ExpertsConfig, ModelConfig, PruneConfig, Scope, SparsifyConfig
from stun.pruning.job import prune
from stun.runtime.ranks import Ranks

CALIBRATION = CalibrationConfig(path=str(TEXT), samples=13, length=40, micro_batch=2)
RUNS = {
    "identity": {"target": 0.0},
    "experts": {"target": 0.25, "experts": ExpertsConfig(fraction=1.0)},
    "both": {"target": 0.4},
}
ON_TWO = ("experts", "both")  # on two ranks; runs/test_world.py has those that change nothing


def run(name: str, source: Path, run_dir: Path, ranks: Ranks) -> dict:
    """One run of `RUNS`: nothing to prune, whole experts only, or both."""
    request = RUNS[name]
    if name == "experts":
        request = {**request, "sparsify": SparsifyConfig(scope=[]), "target": target_of_two(source)}
    return prune(PruneConfig(ModelConfig(str(source)), CALIBRATION, run_dir=str(run_dir), **request), ranks)


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
            for name in ON_TWO:
                run(name, sources / family, runs / family / name, ranks)
