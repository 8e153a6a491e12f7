"""Layer ratios: the share of single weights removed from each layer, by outliers, from a file, or the same for all."""

import math
from pathlib import Path

import torch

from stun.config import SparsifyConfig, StunError
from stun.files import read_json
from stun.model.architecture import Architecture
from stun.planning.budget import LayerSize, matrix_sizes
from stun.planning.plan import Plan
from stun.schema import SHARE, list_of
from stun.sparsify.ratios import BINS, meet, owl, share_above
from stun.statistics.store import Statistics


def check_ratios(config: SparsifyConfig, arch: Architecture) -> None:
    """Raises StunError if `sparsify.ratios` names a file without one ratio for every layer."""
    if config.ratios_file:
        _read(config.ratios_file, len(arch.layers))


def _read(file: str, layers: int) -> list[float]:
    ratios = read_json(Path(file), f"sparsify.ratios={file}: uniform, owl, or a JSON file is needed")
    if not list_of(SHARE, layers).fits(ratios):
        raise StunError(f"sparsify.ratios={file}: a list of {layers} numbers from 0 to 1 is needed, one for each decoder layer")
    return ratios


def set_ratios(plan: Plan, config: SparsifyConfig, arch: Architecture, sizes: list[LayerSize], stats: Statistics | None) -> None:
    """Give the plan's layers the configured ratios; with `uniform` the plan keeps those it has.

    All ratios are shifted by the same amount so that the plan's zeros are met. Raises StunError if outliers are needed and the
    statistics hold none.
    """
    scope = [sum(matrix_sizes([size], [len(layer.clusters)])) for size, layer in zip(sizes, plan.layers, strict=True)]
    ratios = [plan.ratio if layer.ratio is None else layer.ratio for layer in plan.layers]
    if not plan.zeros or (config.ratios == "uniform" and all(layer.ratio is None for layer in plan.layers)):
        return
    if config.counts_outliers:
        outliers = [_outliers(plan, index, config, sizes, stats) for index in range(len(sizes))]
        ratios = owl(outliers, scope, plan.ratio, config.spread)
    elif config.ratios_file:
        ratios = _read(config.ratios_file, len(arch.layers))
    for layer, ratio in zip(plan.layers, meet(ratios, scope, plan.zeros), strict=True):
        layer.ratio = ratio


def _outliers(plan: Plan, index: int, config: SparsifyConfig, sizes: list[LayerSize], stats: Statistics) -> float:
    """Share of a layer's scores above `config.outlier` times their mean, over the experts kept.

    A cluster whose representative is not chosen yet counts as one expert with the mean of its members' scores.
    """
    layer, scores = plan.layers[index], stats.outliers(index)
    parts = [(scores[f"outliers of {name}"].double(), float(scores[f"sum of {name}"])) for name in sorted(sizes[index].dense)]
    for cluster in layer.clusters if sizes[index].expert_parts else []:
        members = [expert for expert in cluster if expert in layer.kept] or cluster
        counts_B = scores["outliers"][members].double().sum(0) / len(members)
        parts.append((counts_B, float(scores["outlier_sums"][members].sum()) / len(members)))
    counts, sums = zip(*parts, strict=True) if parts else ((), ())
    total_B = sum(counts, torch.zeros(BINS, dtype=torch.float64))
    whole = float(total_B.sum())
    threshold = config.outlier * math.fsum(sums) / whole if whole else 0.0
    return share_above(total_B, threshold)
