"""The numbers of every picture, from a run folder. A function returns what its picture shows, None where the run has none of it.

Lists have an entry for each decoder layer, or for each with experts, as said.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from stun.config import ExpertsMethod
from stun.planning.experts.clusters import Merge, complete_linkage
from stun.planning.make import weigh
from stun.report.folder import RunFolder
from stun.run.layer_records import KINDS, PHASES, STAGES
from stun.sparsify.saliency import OCTAVE


def experts_kept(run: RunFolder) -> dict[str, list[int]]:
    """Numbers of experts before and after, by layer."""
    return {"experts": [layer.experts for layer in run.plan], "kept": [len(layer.kept) for layer in run.plan]}


@dataclass(frozen=True)
class Selection:
    """One layer's experts as the selection saw them: distances [E, E], scores [E], `clusters` of alike experts, none where they
    were ranked by score alone; `merges` of a complete linkage within each group that routing is limited to."""

    layer: int
    distance_EE: np.ndarray
    score_E: list[float]
    kept: list[int]
    clusters: list[list[int]]
    merges: list[Merge]

    @property
    def order(self) -> list[int]:
        """The experts so that merged ones are neighbours: the leaves of the trees from left to right."""
        rows = {expert: [expert] for expert in range(len(self.score_E))}
        for merge in self.merges:
            first, second = rows[merge.first], rows[merge.second]
            if first is not second:
                first += second
                rows |= dict.fromkeys(second, first)
        return [expert for row in {id(row): row for row in rows.values()}.values() for expert in row]


def selection(run: RunFolder, layer: int) -> Selection | None:
    """What the run's own lambdas, score and weights of sources make of its statistics of a layer with experts."""
    if run.stats is None:
        return None
    plan = run.plan[layer]
    distance_EE, score_E = weigh(run.experts, run.stats.load(layer, plan.experts), run.stats, layer)
    is_ranked = run.config.get("plan") or run.experts.method is ExpertsMethod.rank
    merges: list[Merge] = []
    groups = 1 if is_ranked else run.summary.get("groups", 1)
    for start in range(0, plan.experts, plan.experts // groups) if not is_ranked else ():
        own = slice(start, start + plan.experts // groups)
        merges += [Merge(m.distance, m.first + start, m.second + start) for m in complete_linkage(distance_EE[own, own])]
    clusters = [] if is_ranked else plan.clusters
    return Selection(layer, distance_EE, score_E.tolist(), plan.kept, clusters, merges)


def scores(run: RunFolder) -> list[Selection] | None:
    """Every layer with experts."""
    return [selection(run, layer) for layer in run.with_experts] if run.stats else None


@dataclass(frozen=True)
class Usage:
    """Of a calibration source, by layer with experts: the share of its routed tokens that each expert serves, and the share that
    those that stay serve."""

    source: str
    share_LE: list[list[float]]
    kept_L: list[float]


def usage(run: RunFolder) -> list[Usage] | None:
    """For every calibration source."""
    if run.stats is None:
        return None
    found = [Usage(source, [], []) for source in run.stats.sources]
    for layer in run.with_experts:
        counts_SEE = run.stats.load(layer, run.plan[layer].experts)["coactivation"]
        for own, count_E in zip(found, counts_SEE.diagonal(dim1=1, dim2=2).double(), strict=True):
            share_E = (count_E / max(1.0, float(count_E.sum()))).tolist()
            own.share_LE.append(share_E)
            own.kept_L.append(math.fsum(share_E[expert] for expert in run.plan[layer].kept))
    return found


def saliency(run: RunFolder) -> dict[str, list] | None:
    """`scores`, the lower edges of bins of a quarter of an octave, without a gap; of the weights looked at, in all layers, how
    many were `kept` and how many `removed`."""
    every, removed = Counter(), Counter()
    for layer in run.layers.get("prune", []):
        every.update({int(place): count for place, count in layer.get("saliency", {}).get("all", {}).items()})
        removed.update({int(place): count for place, count in layer.get("saliency", {}).get("removed", {}).items()})
    if not every:
        return None
    places = range(min(every), max(every) + 1)
    kept = [every[place] - removed[place] for place in places]
    return {"scores": [2 ** (p / OCTAVE) for p in places], "kept": kept, "removed": [removed[place] for place in places]}


def sparsity(run: RunFolder) -> dict[str, list[float | None]] | None:
    """Share of the parameters that left, by kind of tensor and layer, and of `all`; None where a layer has no such kind."""
    if not run.layers.get("prune"):
        return None
    found: dict[str, list[float | None]] = {}
    for kind in KINDS:
        own = [layer["kinds"].get(kind) for layer in run.layers["prune"]]
        if any(own):
            found[kind] = [1 - counts["nonzero"] / counts["parameters"] if counts else None for counts in own]
    found["all"] = [_sparsity_of(list(layer["kinds"].values())) for layer in run.layers["prune"]]
    return found


def _sparsity_of(counts: list[dict]) -> float:
    return 1 - sum(c["nonzero"] for c in counts) / sum(c["parameters"] for c in counts)


def kurtosis(run: RunFolder) -> dict[str, list[float | None]] | None:
    """Kurtosis of the matrices in scope by stage and layer."""
    own = [layer["kurtosis"]["scope"] for layer in run.layers.get("prune", [])]
    found = {stage: [layer.get(stage) for layer in own] for stage in STAGES}
    return found if any(value is not None for values in found.values() for value in values) else None


def layer_error(run: RunFolder) -> list[float] | None:
    """Relative squared error of the hidden states after each layer."""
    return run.result.get("layer_error")


def timeline(run: RunFolder) -> dict[str, dict[str, list[float]]] | None:
    """Stream -> `read`, `compute`, `write` (seconds) and `memory` (GiB) by layer."""
    streams = {name: run.layers[name] for name in ("observe", "prune") if run.layers.get(name)}
    found = {name: {phase: [own["seconds"][phase] for own in layers] for phase in PHASES} for name, layers in streams.items()}
    for name, layers in streams.items():
        found[name]["memory"] = [own["peak_bytes"] / 2**30 for own in layers]
    return found or None


def budget(run: RunFolder) -> dict[str, list[float]] | None:
    """`fraction` leaving as whole experts, and the held-out `error`."""
    curve = run.search.get("error")
    return {"fraction": [float(fraction) for fraction in curve], "error": list(curve.values())} if curve else None


def evaluation(run: RunFolder) -> dict[str, tuple[float | None, float]] | None:
    """Exact match by group: of the dense model, where it is known, and of the pruned one."""
    own, dense = run.result.get("exact_match"), run.result.get("dense", {}).get("exact_match", {})
    return {group: (dense.get(group), value) for group, value in own.items()} if own else None


def size(run: RunFolder) -> dict[str, int] | None:
    """Bytes of the files with weights, `before` and `after`."""
    before, after = run.summary.get("source_bytes"), run.summary.get("disk_bytes")
    return {"before": before, "after": after} if before and after else None
