"""The run folder of a large model, without the model: what a report reads, with numbers from a generator."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import yaml

from helpers.results import RESULT
from stun.config import ExpertsConfig
from stun.model.runtimes import runtimes
from stun.planning.experts.clusters import clusters_of, complete_linkage
from stun.statistics.store import Statistics

KINDS = {"experts": 60_000, "shared": 2_000, "mlp": 3_000, "attention": 4_000, "other": 500}
DISTINCT = 4  # layers whose statistics are drawn; the others repeat them


def make_run(folder: Path, layers: int, experts: int, sources: tuple[str, ...] = ("code", "text")) -> Path:
    """A finished run of `layers` layers with `experts` experts each, a quarter of which were removed."""
    folder.mkdir(parents=True)
    kept, generator = experts - experts // 4, np.random.default_rng(0)
    drawn = [_statistics(generator, experts, len(sources)) for _ in range(min(DISTINCT, layers))]
    stats = Statistics(folder / "stats")
    for layer in range(layers):
        stats.save(layer, drawn[layer % len(drawn)])
    identity = {"model": "m", "calibration_tokens": "c", "micro_batch": 8}
    stats.finish({**identity, "sources": dict.fromkeys(sources, 64)})
    clusters = [_clusters(statistics["router_distance"].numpy(), kept) for statistics in drawn]
    plans = [clusters[layer % len(drawn)] for layer in range(layers)]
    plan = [{"experts": experts, "clusters": c, "kept": sorted(cluster[0] for cluster in c)} for c in plans]
    _write(folder / "plan.json", {"target": 0.4, "layers": plan})
    prune = [_pruned_layer(generator, layer, layers) for layer in range(layers)]
    _write(folder / "layers.json", {"observe": prune, "prune": prune, "mtp": []})
    errors = (0.01 * generator.random(layers).cumsum()).tolist()
    _write(folder / "result.json", {**RESULT, "layer_error": errors})
    _write(folder / "search.json", {"error": {str(f / 10): 0.1 + (f / 10 - 0.4) ** 2 for f in range(11)}})
    _write(folder / "manifest.json", {"summary": summary(layers, experts, kept)})
    config = {"experts": asdict(ExpertsConfig()), "sparsify": {"method": "wanda"}}
    text = json.dumps({"config": config, "source": "m", "calibration_tokens": "c"}, default=lambda value: value.name)
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(text)))
    return folder


def _write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content))


def _statistics(generator: np.random.Generator, experts: int, sources: int) -> dict[str, torch.Tensor]:
    """Statistics of a layer whose experts lie around some centres."""
    centres = generator.normal(size=(max(2, experts // 8), 16))
    points = centres[generator.integers(len(centres), size=experts)] + 0.4 * generator.normal(size=(experts, 16))
    distance_EE = np.sqrt(np.square(points[:, None] - points).sum(-1))
    tokens = generator.pareto(1.5, size=(sources, experts))
    coactivation = (1e3 * tokens[:, :, None] * np.minimum(tokens[:, None, :], 10)).astype(np.int64)
    powers = tokens[:, :, None, None] * generator.uniform(0.5, 2, size=(sources, experts, 3, 3))
    return {
        "router_distance": torch.tensor(distance_EE),
        "coactivation": torch.tensor(coactivation),
        "powers": torch.tensor(powers),
        "peak": torch.ones(sources, experts, dtype=torch.float64),
        "weights": torch.ones(experts, 3, dtype=torch.float64),
    }


def _clusters(distance_EE: np.ndarray, kept: int) -> list[list[int]]:
    return clusters_of(len(distance_EE), complete_linkage(distance_EE)[: len(distance_EE) - kept])


def _pruned_layer(generator: np.random.Generator, layer: int, layers: int) -> dict:
    kinds = {kind: {"parameters": size, "nonzero": int(size * generator.uniform(0.5, 0.9))} for kind, size in KINDS.items()}
    scope = {"dense": 5.0, "experts_removed": 5.0, "weights_removed": 3.0}
    bins = {str(place): int(1e6 * math.exp(-((place - layer / layers) ** 2) / 200)) for place in range(-60, 40)}
    return {
        "seconds": {phase: float(generator.uniform(0.5, 2)) for phase in ("read", "compute", "write")},
        "peak_bytes": int(generator.uniform(20, 30) * 2**30),
        "kinds": kinds,
        "kurtosis": {"scope": {stage: value + float(generator.random()) for stage, value in scope.items()}},
        "saliency": {"all": bins, "removed": {place: count // 3 for place, count in bins.items()}},
    }


def summary(layers: int, experts: int, kept: int) -> dict:
    """Summary of such a run."""
    parameters = layers * sum(KINDS.values()) * 10**6
    return {
        "target": 0.4,
        "sparsity": 0.4,
        "parameters": parameters,
        "nonzero": int(0.6 * parameters),
        "experts": [experts] * layers,
        "kept": [kept] * layers,
        "groups": 1,
        "loads_in": runtimes("DeepseekV3ForCausalLM", [kept] * layers),
        "ratio": 0.2,
        "ranks": 8,
        "peak_bytes": 30 * 2**30,
        "seconds": 1234.5,
        "bytes_read": [10**12],
        "bytes_written": 10**12,
        "model_type": "deepseek_v3",
        "source": "/data/large",
        "source_bytes": 2 * parameters,
        "disk_bytes": int(1.5 * parameters),
        "command": "stun prune model.path=/data/large",
    }
