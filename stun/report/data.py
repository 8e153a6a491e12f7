"""Numbers of every picture, from a run folder. A function returns the data of its picture, None if the run has none.

Lists have an entry per decoder layer, or per layer with experts, as stated.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stun.config import ExpertsMethod
from stun.planning.experts.clusters import Merge, complete_linkage
from stun.planning.make import weigh
from stun.report.folder import RunFolder
from stun.run.layer_records import KINDS, PHASES, STAGES, left_by_refits
from stun.sparsify.saliency import OCTAVE


def experts_kept(run: RunFolder) -> dict[str, list[int]]:
    """Numbers of experts before and after, by layer."""
    return {"experts": [layer.experts for layer in run.plan], "kept": [len(layer.kept) for layer in run.plan]}


@dataclass(frozen=True)
class Selection:
    """Experts of one layer as the selection saw them: distances [E, E], scores [E], and `clusters` of similar experts (none if
    they were ranked by score). `merges` are those of complete linkage within each group that routing is limited to."""

    layer: int
    distance_EE: np.ndarray
    score_E: list[float]
    kept: list[int]
    clusters: list[list[int]]
    merges: list[Merge]

    @property
    def order(self) -> list[int]:
        """Experts in the order of the trees' leaves, so that merged ones are neighbours."""
        rows = {expert: [expert] for expert in range(len(self.score_E))}
        for merge in self.merges:
            first, second = rows[merge.first], rows[merge.second]
            if first is not second:
                first += second
                rows |= dict.fromkeys(second, first)
        return [expert for row in {id(row): row for row in rows.values()}.values() for expert in row]


def selection(run: RunFolder, layer: int) -> Selection | None:
    """Selection of a layer with experts, from the run's statistics and its own lambdas, score and weights of sources."""
    if run.stats is None:
        return None
    plan = run.plan[layer]
    distance_EE, score_E, _ = weigh(run.experts, run.stats.load(layer, plan.experts), run.stats, layer)
    is_ranked = run.config.get("plan") or run.experts.method is ExpertsMethod.rank
    merges: list[Merge] = []
    groups = 1 if is_ranked else run.summary.get("groups", 1)
    for start in range(0, plan.experts, plan.experts // groups) if not is_ranked else ():
        rows = slice(start, start + plan.experts // groups)
        merges += [Merge(m.distance, m.first + start, m.second + start) for m in complete_linkage(distance_EE[rows, rows])]
    clusters = [] if is_ranked else plan.clusters
    return Selection(layer, distance_EE, score_E.tolist(), plan.kept, clusters, merges)


@lru_cache(maxsize=1)  # two sections need them, and a large model's take seconds
def scores(run: RunFolder) -> list[Selection] | None:
    """Selections of all layers with experts."""
    return [selection(run, layer) for layer in run.with_experts] if run.stats else None


@dataclass(frozen=True)
class Usage:
    """Routed tokens of a calibration source, by layer with experts: the share of each expert, and the share of the kept experts
    together."""

    source: str
    share_LE: list[list[float]]
    kept_L: list[float]


def usage(run: RunFolder) -> list[Usage] | None:
    """Usage of every calibration source."""
    if run.stats is None:
        return None
    usages = [Usage(source, [], []) for source in run.stats.sources]
    for layer in run.with_experts:
        counts_SEE = run.stats.load(layer, run.plan[layer].experts)["coactivation"]
        for source_usage, count_E in zip(usages, counts_SEE.diagonal(dim1=1, dim2=2).double(), strict=True):
            share_E = (count_E / max(1.0, float(count_E.sum()))).tolist()
            source_usage.share_LE.append(share_E)
            source_usage.kept_L.append(math.fsum(share_E[expert] for expert in run.plan[layer].kept))
    return usages


def saliency(run: RunFolder) -> dict[str, list] | None:
    """Histogram of weight scores over all layers: `scores`, the lower edges of adjacent bins of a quarter of an octave, and the
    numbers of weights `kept` and `removed` in each."""
    total, removed = Counter(), Counter()
    for layer in run.layers.get("prune", []):
        total.update({int(place): count for place, count in layer.get("saliency", {}).get("all", {}).items()})
        removed.update({int(place): count for place, count in layer.get("saliency", {}).get("removed", {}).items()})
    if not total:
        return None
    places = range(min(total), max(total) + 1)
    kept = [total[place] - removed[place] for place in places]
    return {"scores": [2 ** (p / OCTAVE) for p in places], "kept": kept, "removed": [removed[place] for place in places]}


def sparsity(run: RunFolder) -> dict[str, list[float | None]] | None:
    """Share of removed parameters by kind of tensor and layer, and of `all`; None if a layer has no such kind."""
    if not run.layers.get("prune"):
        return None
    by_kind: dict[str, list[float | None]] = {}
    for kind in KINDS:
        counts_L = [layer["kinds"].get(kind) for layer in run.layers["prune"]]
        if any(counts_L):
            by_kind[kind] = [1 - counts["nonzero"] / counts["parameters"] if counts else None for counts in counts_L]
    by_kind["all"] = [_sparsity_of(list(layer["kinds"].values())) for layer in run.layers["prune"]]
    return by_kind


def _sparsity_of(counts: list[dict]) -> float:
    return 1 - sum(c["nonzero"] for c in counts) / sum(c["parameters"] for c in counts)


def kurtosis(run: RunFolder) -> dict[str, list[float | None]] | None:
    """Kurtosis of the matrices in scope, by stage and layer."""
    by_layer = [layer["kurtosis"]["scope"] for layer in run.layers.get("prune", [])]
    by_stage = {stage: [layer.get(stage) for layer in by_layer] for stage in STAGES}
    return by_stage if any(value is not None for values in by_stage.values() for value in values) else None


def refit(run: RunFolder) -> list[float | None] | None:
    """Share of each layer's error that the joint refit left."""
    shares = left_by_refits(run.layers)
    return shares if any(share is not None for share in shares) else None


def layer_error(run: RunFolder) -> list[float] | None:
    """Relative squared error of the hidden states after each layer."""
    return run.result.get("layer_error")


def timeline(run: RunFolder) -> dict[str, dict[str, list[float]]] | None:
    """Stream -> `read`, `compute`, `write` (seconds) and `memory` (GiB) by layer."""
    streams = {name: run.layers[name] for name in ("observe", "prune") if run.layers.get(name)}
    times = {name: {phase: [layer["seconds"][phase] for layer in layers] for phase in PHASES} for name, layers in streams.items()}
    for name, layers in streams.items():
        times[name]["memory"] = [layer["peak_bytes"] / 2**30 for layer in layers]
    return times or None


def budget(run: RunFolder) -> dict[str, list[float]] | None:
    """`fraction` of the removed parameters in whole experts, and the held-out `error`."""
    curve = run.search.get("error")
    return {"fraction": [float(fraction) for fraction in curve], "error": list(curve.values())} if curve else None


def evaluation(run: RunFolder) -> dict[str, tuple[float | None, float]] | None:
    """Exact match by group: (dense model, None if not known; pruned model)."""
    pruned, dense = run.result.get("exact_match"), run.result.get("dense", {}).get("exact_match", {})
    return {group: (dense.get(group), value) for group, value in pruned.items()} if pruned else None


def size(run: RunFolder) -> dict[str, int] | None:
    """Bytes of the files with weights, `before` and `after`."""
    before, after = run.summary.get("source_bytes"), run.summary.get("disk_bytes")
    return {"before": before, "after": after} if before and after else None
