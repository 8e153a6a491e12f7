"""The share of single weights that each layer loses, into a plan: by outliers, from a file, or the same for all."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from stun.config import SparsifyConfig, StunError
from stun.files import read_json
from stun.model.architecture import Architecture
from stun.planning.budget import LayerSize, matrix_sizes
from stun.planning.plan import Plan
from stun.sparsify.ratios import BINS, meet, owl, share_above
from stun.statistics.store import Statistics


def check_ratios(how: SparsifyConfig, arch: Architecture) -> None:
    """Raises StunError where `sparsify.ratios` names a file that holds no ratio for every layer."""
    if how.ratios_file:
        _read(how.ratios_file, len(arch.layers))


def _read(file: str, layers: int) -> list[float]:
    ratios = read_json(Path(file), f"sparsify.ratios={file}: uniform, owl, or a JSON file is needed")
    fits = type(ratios) is list and len(ratios) == layers
    if not fits or not all(type(ratio) in (int, float) and 0 <= ratio <= 1 for ratio in ratios):
        raise StunError(f"sparsify.ratios={file}: a list of {layers} numbers from 0 to 1 is needed, one for each decoder layer")
    return ratios


def set_ratios(plan: Plan, how: SparsifyConfig, arch: Architecture, sizes: list[LayerSize], stats: Statistics | None) -> None:
    """Give the plan's layers the ratios that `how` asks for; those the plan has stay where it asks none.

    All of them are shifted by the same amount so that the plan's zeros are met. Raises StunError where the statistics hold no
    outliers.
    """
    scope = [sum(matrix_sizes([size], [len(layer.clusters)])) for size, layer in zip(sizes, plan.layers, strict=True)]
    given = [plan.ratio if layer.ratio is None else layer.ratio for layer in plan.layers]
    if not plan.zeros or (how.ratios == "uniform" and all(layer.ratio is None for layer in plan.layers)):
        return
    if how.counts_outliers:
        given = owl([_outliers(plan, index, how, sizes, stats) for index in range(len(sizes))], scope, plan.ratio, how.spread)
    elif how.ratios_file:
        given = _read(how.ratios_file, len(arch.layers))
    for layer, ratio in zip(plan.layers, meet(given, scope, plan.zeros), strict=True):
        layer.ratio = ratio


def _outliers(plan: Plan, index: int, how: SparsifyConfig, sizes: list[LayerSize], stats: Statistics) -> float:
    """Share of a layer's scores above `how.outlier` times their mean, over the experts that stay.

    Where it is not yet known which member of a cluster stays, the members stand for it together, as one expert.
    """
    layer, found = plan.layers[index], stats.outliers(index)
    parts = [(found[f"outliers of {name}"].double(), float(found[f"sum of {name}"])) for name in sorted(sizes[index].dense)]
    for cluster in layer.clusters if sizes[index].expert_parts else []:
        own = [expert for expert in cluster if expert in layer.kept] or cluster
        counts_B = found["outliers"][own].double().sum(0) / len(own)
        parts.append((counts_B, float(found["outlier_sums"][own].sum()) / len(own)))
    counts, sums = zip(*parts, strict=True) if parts else ((), ())
    total_B = sum(counts, torch.zeros(BINS, dtype=torch.float64))
    whole = float(total_B.sum())
    threshold = how.outlier * math.fsum(sums) / whole if whole else 0.0
    return share_above(total_B, threshold)
