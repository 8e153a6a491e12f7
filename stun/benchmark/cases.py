"""The cases by name: what each checks, measures and leaves in its folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from stun.benchmark.against_peers import benchmark_peers, check_peers, pruned
from stun.benchmark.checkpoints import arctic, bytes_of, qwen3_moe
from stun.benchmark.layer import benchmark_layer, layer_shape
from stun.benchmark.scaling import benchmark_depth, benchmark_growth, benchmark_ranks, sizes
from stun.benchmark.weights import benchmark_weights, ways
from stun.config import BenchmarkCase, BenchmarkConfig, CheckpointShape, PruneConfig, StunError
from stun.data import calibration_samples, load_tokenizer
from stun.files import write_json
from stun.planning.validation import validate
from stun.preflight.hardware import GIB, disk_free
from stun.preflight.speeds import SAMPLE
from stun.runtime.ranks import Ranks

_CASES = {
    BenchmarkCase.layer: benchmark_layer,
    BenchmarkCase.weights: benchmark_weights,
    BenchmarkCase.growth: benchmark_growth,
    BenchmarkCase.ranks: benchmark_ranks,
    BenchmarkCase.depth: benchmark_depth,
    BenchmarkCase.peers: benchmark_peers,
}
_MADE = "made"  # what a case makes below run_dir and removes


def benchmark(cfg: BenchmarkConfig, ranks: Ranks) -> dict:
    """Measure `cfg.case`; returns what is in `cfg.run_dir`/CASE.json then. All ranks call this together. Raises StunError before
    anything is made where the request cannot be met."""
    folder = Path(cfg.run_dir)
    ranks.on_first(lambda: _check(cfg, ranks))
    ranks.on_first(lambda: (folder / _MADE).mkdir(parents=True))
    try:
        result = {"case": cfg.case.name, **machine(ranks), **_CASES[cfg.case](cfg, folder / _MADE, ranks)}
    finally:
        if ranks.is_first:
            shutil.rmtree(folder / _MADE)
    ranks.on_first(lambda: write_json(folder / f"{cfg.case.name}.json", result))
    return result


def machine(ranks: Ranks) -> dict:
    """What was measured on, and when."""
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
    """Of all checkpoints that a case makes."""
    if cfg.case is BenchmarkCase.layer:
        return [layer_shape(cfg, ranks.device)]
    if cfg.case is BenchmarkCase.growth:
        return [shape for shape, _ in sizes(cfg).values()]
    deepest = [replace(cfg.shape, layers=max(cfg.depths))] if cfg.depths else []
    return {BenchmarkCase.depth: deepest, BenchmarkCase.peers: [cfg.shape, *deepest]}.get(cfg.case, [cfg.shape])


def _asked(cfg: BenchmarkConfig) -> list[PruneConfig]:
    """Of all runs of a case, as far as they differ in more than their sizes."""
    if cfg.case is BenchmarkCase.weights:
        return list(ways(cfg, Path(cfg.model.path)).values())
    return list(pruned(cfg).values()) if cfg.case is BenchmarkCase.peers else [cfg]


def _check(cfg: BenchmarkConfig, ranks: Ranks) -> None:
    """Raises StunError where something of the request cannot be, before anything is made."""
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
    for own in _asked(cfg):
        validate(own)
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
    needed, free = 2 * largest + SAMPLE, disk_free(cfg.run_dir)  # the source and what is made of it; runs check for more
    if needed > free:
        raise StunError(f"run_dir={cfg.run_dir}: about {needed / GIB:.1f} GiB of disk are needed, {free / GIB:.1f} GiB are free")


def _check_list(cfg: BenchmarkConfig) -> None:
    """The numbers of a case that runs once for each of them; `peers` can do without."""
    depths = dict.fromkeys((BenchmarkCase.depth, BenchmarkCase.peers), "depths")
    name = {BenchmarkCase.growth: "factors", BenchmarkCase.ranks: "worlds", **depths}.get(cfg.case)
    if name and min(getattr(cfg, name), default=1 if cfg.case is BenchmarkCase.peers else 0) < 1:
        raise StunError(f"{name}={getattr(cfg, name)}: whole numbers above 0 are needed")


def _check_folder(cfg: BenchmarkConfig) -> None:
    """The folder may hold the results of other cases, and nothing else."""
    folder, results = Path(cfg.run_dir), {f"{case.name}.json" for case in BenchmarkCase if case is not cfg.case}
    if folder.exists() and (not folder.is_dir() or {file.name for file in folder.iterdir()} - results):
        raise StunError(f"run_dir={cfg.run_dir}: holds something; choose an empty or new folder, or other cases' results")


def _check_shape(shape: CheckpointShape) -> None:
    if min(shape.expert_width, shape.layers, shape.top_k, shape.vocabulary, shape.hidden // 64) < 1 or shape.hidden % 64:
        raise StunError(f"shape={shape}: numbers above 0 are needed, and hidden a multiple of 64")
    if shape.top_k > shape.experts:
        raise StunError(f"shape.top_k={shape.top_k}: at most shape.experts={shape.experts}")
