"""Benchmark cases by name: checks before a case, and its result as a file."""

import os
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from stun.benchmark import whole_runs
from stun.benchmark.against_peers import benchmark_peers, check_peers, prune_configs
from stun.benchmark.checkpoints import arctic, bytes_of, qwen3_moe
from stun.benchmark.config import BenchmarkCase, BenchmarkConfig, CheckpointShape
from stun.benchmark.io import benchmark_io
from stun.benchmark.layer import benchmark_layer, layer_shape
from stun.checkpoint import hub
from stun.config import ModelConfig, PruneConfig, StunError
from stun.data.samples import calibration_samples
from stun.data.tokenizer import load_tokenizer
from stun.files import write_json
from stun.planning.validation import validate
from stun.preflight.hardware import SAMPLE, disk_free
from stun.runtime.ranks import Ranks
from stun.runtime.units import size

_CASES = {
    BenchmarkCase.layer: benchmark_layer,
    BenchmarkCase.io: benchmark_io,
    BenchmarkCase.weights: whole_runs.benchmark_weights,
    BenchmarkCase.growth: whole_runs.benchmark_growth,
    BenchmarkCase.ranks: whole_runs.benchmark_ranks,
    BenchmarkCase.depth: whole_runs.benchmark_depth,
    BenchmarkCase.peers: benchmark_peers,
}


def benchmark(cfg: BenchmarkConfig, ranks: Ranks) -> dict:
    """Result of `cfg.case`, also written to `cfg.run_dir`/CASE.json. All ranks call this together. Raises StunError, before
    anything is written, if the case cannot run."""
    made = Path(cfg.run_dir) / "made"  # everything but the result
    cfg = replace(cfg, model=ModelConfig(hub.folder(hub.pinned(cfg.model.path, ranks))))
    ranks.on_first(lambda: _check(cfg, ranks))
    ranks.on_first(lambda: made.mkdir(parents=True))
    try:
        result = {"case": cfg.case.name, **machine(ranks), **_CASES[cfg.case](cfg, made, ranks)}
    finally:
        if ranks.is_first:
            shutil.rmtree(made)
    ranks.on_first(lambda: write_json(made.parent / f"{cfg.case.name}.json", result))
    return result


def machine(ranks: Ranks) -> dict:
    """Hardware, software and time of a measurement."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{cores} CPU cores",
        "gpus": gpus,
        "cores": cores,
        "ranks": ranks.world,
    }


def _shapes(cfg: BenchmarkConfig, ranks: Ranks) -> list[CheckpointShape]:
    """Shapes of all checkpoints that a case writes."""
    if cfg.case is BenchmarkCase.layer:
        return [layer_shape(cfg, ranks.device)]
    if cfg.case is BenchmarkCase.growth:
        return [shape for shape, _ in whole_runs.sizes(cfg).values()]
    deepest = [replace(cfg.shape, layers=max(cfg.depths))] if cfg.depths else []
    return {BenchmarkCase.depth: deepest, BenchmarkCase.peers: [cfg.shape, *deepest]}.get(cfg.case, [cfg.shape])


def _configs(cfg: BenchmarkConfig) -> list[PruneConfig]:
    """Configurations of a case's runs that differ in more than their sizes."""
    if cfg.case is BenchmarkCase.weights:
        return list(whole_runs.method_configs(cfg, Path(cfg.model.path)).values())
    return list(prune_configs(cfg).values()) if cfg.case is BenchmarkCase.peers else [cfg]


def _check(cfg: BenchmarkConfig, ranks: Ranks) -> None:
    """Check the whole request before anything is written. Raises StunError."""
    if cfg.target is None or cfg.is_counted:  # a target fits checkpoints of every size
        raise StunError("stun benchmark: give target, and leave out experts.keep, experts.drop and fit")
    _check_folder(cfg)
    if ranks.world > 1 and cfg.case is not BenchmarkCase.weights:
        raise StunError(f"case={cfg.case.name}: runs on one rank, here are {ranks.world}; case=ranks starts its own")
    _check_list(cfg)
    if cfg.depth < 1:
        raise StunError(f"depth={cfg.depth}: at least 1")
    shapes = _shapes(cfg, ranks)
    for shape in shapes:
        _check_shape(shape)
    if cfg.case is BenchmarkCase.peers:
        check_peers(cfg)
    for config in _configs(cfg):
        validate(config)
    if cfg.case is BenchmarkCase.layer:
        if cfg.experts.fraction == "auto" or cfg.sparsify.ratios != "uniform" or not cfg.target:
            raise StunError("case=layer: needs a target above 0, a number as experts.fraction and uniform ratios")
    else:
        most = cfg.calibration.samples * (max(cfg.factors) if cfg.case is BenchmarkCase.growth else 1)
        if not Path(cfg.model.path).is_dir():
            raise StunError(f"model.path={cfg.model.path}: not a folder; its tokenizer is needed")
        tokenizer = load_tokenizer(Path(cfg.model.path))
        calibration_samples(replace(cfg.calibration, samples=most), tokenizer, cfg.shape.vocabulary)
    family = arctic if cfg.case is BenchmarkCase.layer else qwen3_moe
    largest = max(bytes_of(family(shape)) for shape in shapes)
    needed, free = 2 * largest + SAMPLE, disk_free(cfg.run_dir)  # source and pruned checkpoint; each run checks for more
    if needed > free:
        raise StunError(f"run_dir={cfg.run_dir}: about {size(needed)} of disk are needed, {size(free)} are free")


def _check_list(cfg: BenchmarkConfig) -> None:
    """Check the numbers of a case that runs once for each; `peers` may have none."""
    name = {"io": "threads", "growth": "factors", "ranks": "worlds", "depth": "depths", "peers": "depths"}.get(cfg.case.name)
    if name and min(getattr(cfg, name), default=1 if cfg.case is BenchmarkCase.peers else 0) < 1:
        raise StunError(f"{name}={getattr(cfg, name)}: whole numbers above 0 are needed")


def _check_folder(cfg: BenchmarkConfig) -> None:
    """Check that the folder holds nothing but results of other cases."""
    folder, results = Path(cfg.run_dir), {f"{case.name}.json" for case in BenchmarkCase if case is not cfg.case}
    if folder.exists() and (not folder.is_dir() or {file.name for file in folder.iterdir()} - results):
        raise StunError(f"run_dir={cfg.run_dir}: holds something; choose an empty or new folder, or other cases' results")


def _check_shape(shape: CheckpointShape) -> None:
    if min(shape.expert_width, shape.layers, shape.top_k, shape.vocabulary, shape.hidden // 64) < 1 or shape.hidden % 64:
        raise StunError(f"shape={shape}: numbers above 0 are needed, and hidden a multiple of 64")
    if shape.top_k > shape.experts:
        raise StunError(f"shape.top_k={shape.top_k}: at most shape.experts={shape.experts}")
