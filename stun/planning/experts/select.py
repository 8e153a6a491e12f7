"""From evidence to the plans of all layers, for a budget that is met exactly.

Every method turns a layer into a sequence of steps of growing height: the merges of its experts, or their departures in order of
worth. Cutting the sequences after exactly the number of steps wanted meets any budget: per layer (uniform), or over all layers by
one threshold (global).

Where routing is limited to groups of experts, nothing crosses a group and every group loses as many: a step then holds one
move in each group. Protected experts take no part: they stay, alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from stun.config import ExpertsMethod, Representative, StunError
from stun.planning.experts.clusters import Merge, clusters_of, complete_linkage, official_merges
from stun.planning.plan import LayerPlan


@dataclass(frozen=True)
class Evidence:
    """What is known of one layer's experts: distances [E, E], scores [E] (higher is kept), who must stay."""

    distance_EE: np.ndarray
    score_E: torch.Tensor
    protected: frozenset[int] = frozenset()

    @property
    def experts(self) -> int:
        return len(self.distance_EE)

    def movable(self, groups: int) -> list[list[int]]:
        """The experts of each group that may leave."""
        size = self.experts // groups
        return [[e for e in range(g * size, (g + 1) * size) if e not in self.protected] for g in range(groups)]

    def by_worth(self, members: list[int]) -> list[int]:
        """`members`, the most worth keeping first; of equals the lower index."""
        return sorted(members, key=lambda expert: (-float(self.score_E[expert]), expert))


@dataclass(frozen=True)
class Step:
    """One move in every group: `merges` of clusters, or experts that are `gone`."""

    height: float
    merges: list[Merge] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)


def _merge_steps(evidence: Evidence, groups: int, merges_of: Callable[[np.ndarray], list[Merge]]) -> list[Step]:
    """The t-th merges of all groups, for every t that all of them reach."""
    sequences = []
    for members in evidence.movable(groups):
        merges = merges_of(evidence.distance_EE[np.ix_(members, members)])
        sequences.append([Merge(m.distance, members[m.first], members[m.second]) for m in merges])
    return [Step(max(m.distance for m in merges), list(merges)) for merges in zip(*sequences, strict=False)]


def _rank_steps(evidence: Evidence, groups: int) -> list[Step]:
    """Departures in order of worth, the least first. Heights are shares of the layer's mean score, comparable between layers."""
    scale = float(evidence.score_E.abs().mean()) or 1.0
    sequences = [evidence.by_worth(members)[::-1] for members in evidence.movable(groups)]
    return [
        Step(max(float(evidence.score_E[e]) for e in gone) / scale, gone=list(gone)) for gone in zip(*sequences, strict=False)
    ]


_LOOKED_AT = 1 << 20  # distances that may become a threshold


def _official_steps(layers: list[Evidence], groups: int, count: Callable[[list[list[Step]]], int], wanted: int):
    """Steps [layer] of the published code's merges at one threshold for all given layers, of which `count` says `wanted`.

    At most a thousandth more where that is soon found, else the fewest at one of the distances (a part of them, evenly taken,
    where they are millions). More merges at a higher threshold is what usually happens, which makes the search short; the
    algorithm does not promise it. Raises StunError where no threshold merges that much.
    """
    edges = np.concatenate([e.distance_EE[np.triu_indices(e.experts, 1)] for e in layers])
    thresholds = np.append(np.unique(edges[:: 1 + len(edges) // _LOOKED_AT]), np.inf)
    last = len(thresholds) - 1

    def merged(at: int) -> list[list[Step]]:
        limit = float(thresholds[at])
        return [_merge_steps(e, groups, lambda d: official_merges(d, limit)) for e in layers]

    # From small thresholds up: the pairs below them are soon looked through.
    low, under, high = -1, 0, min(2 * wanted * last // max(1, len(edges)), last)
    while (over := count(found := merged(high))) < wanted:
        if high == last:
            raise StunError("experts.method=stun_official: no threshold drops that many experts; lower experts.fraction")
        low, under, high = high, over, min(4 * high + 64, last)
    while over > wanted + wanted // 1000 and high - low > 1:
        share = min(max((wanted - under) / (over - under), 0.1), 0.9)  # counts grow about as the logarithm of the pairs
        middle = min(max(int((low + 2) ** (1 - share) * (high + 2) ** share) - 2, low + 1), high - 1)
        steps = merged(middle)
        if (here := count(steps)) < wanted:
            low, under = middle, here
        else:
            high, over, found = middle, here, steps
    return found


def cut_global(layers: list[list[Step]], most: list[int], total: int) -> list[int]:
    """How many steps each layer takes so that the `total` lowest of all are taken, at most `most[l]` of layer l.

    Within a layer only the prefix counts, so a step is ranked by the largest height up to it.
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
    """Plans of every layer such that exactly sum(drops) experts leave.

    `drops[l]` leave layer l, or, with `one_threshold`, as many as the common threshold says, up to `most[l]`. Both are
    multiples of `groups`, and every group loses the same number. Raises StunError where protected experts leave too few to go.
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
    """Raises StunError where protected experts leave fewer to go than are to leave."""
    free = [min(len(steps), limit) for steps, limit in zip(layers, most, strict=True)]
    if one_threshold and sum(free) < sum(wanted):
        asked, may = groups * sum(wanted), groups * sum(free)
        raise StunError(f"{asked} experts are to leave, but without the protected ones only {may} may; protect fewer")
    for number, (count, room) in enumerate(zip(wanted, free, strict=True)):
        if not one_threshold and room < count:
            here = f"{groups * count} experts are to leave layer {number} of those with experts"
            raise StunError(f"{here}, but without the protected ones only {groups * room} may; protect fewer")


def _layer_plan(evidence: Evidence, steps: list[Step], representative: Representative, kappa: int) -> LayerPlan:
    """Clusters of the experts that have not gone, the members of each in order of worth."""
    gone = {expert for step in steps for expert in step.gone}
    whole = clusters_of(evidence.experts, [merge for step in steps for merge in step.merges])
    clusters = [evidence.by_worth(members) for members in whole if not gone.intersection(members)]
    return LayerPlan.of(evidence.experts, clusters, representative is Representative.nearest, len(clusters) <= kappa)
