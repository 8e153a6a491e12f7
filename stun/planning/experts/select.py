"""Selection of experts: plans of all layers from scores and distances, for a budget that is met exactly.

Every method turns a layer into a sequence of steps, each of which removes one expert: merges in order of distance, or removals
in order of score. Any budget is met by taking the right number of steps: per layer (uniform), or over all layers by one
threshold (global).

Where routing is limited to groups of experts, no merge crosses a group and a step removes one expert from every group, so that
all groups keep the same number. Protected experts take no part: each is kept as a cluster of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from stun.config import ExpertsMethod, Representative, StunError
from stun.planning.experts.clusters import Merge, clusters_of, complete_linkage, official_merges
from stun.planning.plan import LayerPlan


@dataclass(frozen=True)
class Evidence:
    """Distances [E, E] and scores [E] (higher is kept) of one layer's experts, and the protected ones. Scores over `scale` can be
    compared with other layers' (0: over their mean)."""

    distance_EE: np.ndarray
    score_E: torch.Tensor
    protected: frozenset[int] = frozenset()
    scale: float = 0.0

    @property
    def experts(self) -> int:
        return len(self.distance_EE)

    def movable(self, groups: int) -> list[list[int]]:
        """Experts of each group that are not protected."""
        size = self.experts // groups
        return [[e for e in range(g * size, (g + 1) * size) if e not in self.protected] for g in range(groups)]

    def by_worth(self, members: list[int]) -> list[int]:
        """`members` by descending score; ties go to the lower index."""
        return sorted(members, key=lambda expert: (-float(self.score_E[expert]), expert))


@dataclass(frozen=True)
class Step:
    """Removal of one expert from every group, by `merges` of clusters or as `removed` experts; lower heights come first."""

    height: float
    merges: list[Merge] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)


def _merge_steps(evidence: Evidence, groups: int, merges_of: Callable[[np.ndarray], list[Merge]]) -> list[Step]:
    """Steps of merges: the t-th step has the t-th merge of every group, as long as all groups have one."""
    sequences = []
    for members in evidence.movable(groups):
        merges = merges_of(evidence.distance_EE[np.ix_(members, members)])
        sequences.append([Merge(m.distance, members[m.first], members[m.second]) for m in merges])
    return [Step(max(m.distance for m in merges), list(merges)) for merges in zip(*sequences, strict=False)]


def _rank_steps(evidence: Evidence, groups: int) -> list[Step]:
    """Steps of removals by ascending score. Heights are relative to the layer's scale, to compare layers."""
    scale = evidence.scale or float(evidence.score_E.abs().mean()) or 1.0
    sequences = [evidence.by_worth(members)[::-1] for members in evidence.movable(groups)]
    return [
        Step(max(float(evidence.score_E[e]) for e in removed) / scale, removed=list(removed))
        for removed in zip(*sequences, strict=False)
    ]


_MOST_THRESHOLDS = 1 << 20  # distances that are candidates for a threshold, at most


def _official_steps(layers: list[Evidence], groups: int, count: Callable[[list[list[Step]]], int], wanted: int):
    """Steps by layer of the published code's merges, at one threshold for all layers that gives `count(steps)` >= `wanted`.

    The search by bisection stops at most a thousandth above `wanted`, or at the lowest threshold it finds among the distances
    (an even sample of them if there are millions). A higher threshold usually gives more merges, but the algorithm does not
    guarantee it. Raises StunError if no threshold gives enough.
    """
    edges = np.concatenate([e.distance_EE[np.triu_indices(e.experts, 1)] for e in layers])
    thresholds = np.append(np.unique(edges[:: 1 + len(edges) // _MOST_THRESHOLDS]), np.inf)
    last = len(thresholds) - 1

    def merged(at: int) -> list[list[Step]]:
        limit = float(thresholds[at])
        return [_merge_steps(e, groups, lambda d: official_merges(d, limit)) for e in layers]

    # From small thresholds up: few pairs lie below them, so that these tries are fast.
    low, under, high = -1, 0, min(2 * wanted * last // max(1, len(edges)), last)
    while (over := count(best := merged(high))) < wanted:
        if high == last:
            raise StunError("experts.method=stun_official: no threshold removes that many experts; lower experts.fraction")
        low, under, high = high, over, min(4 * high + 64, last)
    while over > wanted + wanted // 1000 and high - low > 1:
        share = min(max((wanted - under) / (over - under), 0.1), 0.9)  # counts grow about as the logarithm of the pairs
        middle = min(max(int((low + 2) ** (1 - share) * (high + 2) ** share) - 2, low + 1), high - 1)
        steps = merged(middle)
        if (total := count(steps)) < wanted:
            low, under = middle, total
        else:
            high, over, best = middle, total, steps
    return best


def cut_global(layers: list[list[Step]], most: list[int], total: int) -> list[int]:
    """Number of steps per layer such that the `total` lowest of all layers are taken, at most `most[l]` of layer l.

    A layer's steps are taken in order, so a step is ranked by the largest height up to it.
    """
    ranked = []
    for layer, steps in enumerate(layers):
        heights = np.maximum.accumulate([step.height for step in steps], dtype=np.float64) if steps else np.zeros(0)
        ranked += [(height, layer, number) for number, height in enumerate(heights) if number < most[layer]]
    taken = [0] * len(layers)
    for _, layer, _ in sorted(ranked)[:total]:
        taken[layer] += 1
    return taken


def _available(layers: list[list[Step]], most: list[int]) -> int:
    return sum(min(len(steps), limit) for steps, limit in zip(layers, most, strict=True))


def _sequences(
    method: ExpertsMethod, layers: list[Evidence], wanted: list[int], most: list[int], one_threshold: bool, groups: int
):
    if method is ExpertsMethod.stun:
        return [_merge_steps(e, groups, complete_linkage) for e in layers]
    if method is ExpertsMethod.rank:
        return [_rank_steps(e, groups) for e in layers]
    if one_threshold:
        return _official_steps(layers, groups, lambda steps: _available(steps, most), sum(wanted))
    return [_official_steps([e], groups, lambda steps: len(steps[0]), n)[0] for e, n in zip(layers, wanted, strict=True)]


def select_experts(
    method: ExpertsMethod,
    layers: list[Evidence],
    drops: list[int],
    most: list[int],
    one_threshold: bool,
    groups: int = 1,
    representative: Representative = Representative.nearest,
    kappa: int = 0,
) -> list[LayerPlan]:
    """Plans of every layer that remove exactly sum(drops) experts.

    Layer l loses `drops[l]` experts, or, with `one_threshold`, up to `most[l]` by the common threshold. Both are multiples of
    `groups`, and every group loses the same number. Raises StunError if too few experts are not protected.
    Eight parameters: it is pure and knows no configuration.
    """
    wanted, limits = [count // groups for count in drops], [count // groups for count in most]
    sequences = _sequences(method, layers, wanted, limits, one_threshold, groups)
    _check_room(sequences, wanted, limits, one_threshold, groups)
    taken = cut_global(sequences, limits, sum(wanted)) if one_threshold else wanted
    return [
        _layer_plan(evidence, steps[:count], representative, kappa)
        for evidence, steps, count in zip(layers, sequences, taken, strict=True)
    ]


def _check_room(layers: list[list[Step]], wanted: list[int], most: list[int], one_threshold: bool, groups: int) -> None:
    """Raises StunError if more experts are to be removed than the protected ones allow."""
    free = [min(len(steps), limit) for steps, limit in zip(layers, most, strict=True)]
    needs = [(f" from layer {n} of those with experts", *need) for n, need in enumerate(zip(free, wanted, strict=True))]
    for where, room, count in [("", sum(free), sum(wanted))] if one_threshold else needs:
        if room < count:
            asked = f"{groups * count} experts are to be removed{where}"
            raise StunError(f"{asked}, but the protected ones allow only {groups * room}; protect fewer")


def _layer_plan(evidence: Evidence, steps: list[Step], representative: Representative, kappa: int) -> LayerPlan:
    """Plan with the clusters of the experts that were not removed alone, each by descending score."""
    removed = {expert for step in steps for expert in step.removed}
    whole = clusters_of(evidence.experts, [merge for step in steps for merge in step.merges])
    clusters = [evidence.by_worth(members) for members in whole if not removed.intersection(members)]
    return LayerPlan.of(evidence.experts, clusters, representative is Representative.nearest, len(clusters) <= kappa)
