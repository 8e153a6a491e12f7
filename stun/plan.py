"""Which experts leave: distances, merge sequences, budgets. Pure; knows neither ranks nor files.

Both methods turn a layer into a sequence of merges of growing distance. Cutting the sequences after exactly the number of
merges wanted meets any budget: per layer (uniform), or over all layers by one threshold (global).

Where routing is limited to groups of experts, clusters stay within a group and every group loses as many: a layer is then a
sequence of rounds, one merge in each group. Without groups a round is one merge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from stun.config import ExpertsMethod, StunError


@dataclass(frozen=True)
class Merge:
    """Two clusters become one: the pair of experts that names them, and the distance at which it happened."""

    distance: float
    first: int
    second: int


@dataclass
class LayerPlan:
    """One layer: its experts grouped into `clusters`, of which `kept` are the representatives (empty until chosen)."""

    experts: int
    clusters: list[list[int]]
    kept: list[int] = field(default_factory=list)


@dataclass
class Plan:
    """What a run does to the decoder layers. Parameters are counted over them, routers and norms included.

    `zeros` single weights are removed from `scope_size` candidates, after `dropped` parameters left with whole experts. `mtp`
    are the experts of multi-token-prediction heads, which are not counted.
    """

    target: float
    parameters: int
    dropped: int
    zeros: int
    scope_size: int
    layers: list[LayerPlan]
    mtp: list[LayerPlan] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Share of the surviving candidates that is set to zero."""
        return self.zeros / self.scope_size if self.scope_size else 0.0

    def to_json(self) -> dict:
        """The content of plan.json."""
        return {**asdict(self), "ratio": self.ratio}


def expert_distance(router_ED: torch.Tensor, coactivation_EE: torch.Tensor | None, lambda1: float, lambda2: float) -> np.ndarray:
    """[E, E] distance lambda1 ||W_i - W_j|| - lambda2 a_ij / mean(a), the negated similarity of STUN, eq. 8.

    a counts the tokens routed to both experts, where that is known; the mean runs over the pairs i != j. Symmetric, diagonal 0
    and unused.
    """
    distance_EE = lambda1 * torch.cdist(router_ED.double(), router_ED.double(), compute_mode="donot_use_mm_for_euclid_dist")
    if coactivation_EE is None:
        return distance_EE.fill_diagonal_(0).numpy()
    pairs_EE = coactivation_EE.double().clone().fill_diagonal_(0)
    experts = len(pairs_EE)
    mean = pairs_EE.sum() / (experts * (experts - 1)) if experts > 1 else 0
    if lambda2 and mean > 0:
        distance_EE = distance_EE - lambda2 * pairs_EE / mean
    return distance_EE.fill_diagonal_(0).numpy()


def complete_linkage(distance_EE: np.ndarray) -> list[Merge]:
    """All E - 1 merges of agglomerative clustering with complete linkage; distances never decrease (STUN, algorithm 1)."""
    experts = len(distance_EE)
    if experts < 2:
        return []
    condensed = squareform(distance_EE, checks=False)
    shift = min(0.0, float(condensed.min()))  # linkage asks for non-negative distances; only their order matters
    members: list[int] = list(range(experts))
    merges = []
    for left, right, height, _ in linkage(condensed - shift, method="complete"):
        first, second = sorted((members[int(left)], members[int(right)]))
        members.append(first)
        merges.append(Merge(float(height) + shift, first, second))
    return merges


def official_merges(distance_EE: np.ndarray, threshold: float) -> list[Merge]:
    """The merges of the paper's published code, which differ from complete linkage.

    Repeatedly the closest pair (v1, v2) below the threshold is taken. Its clusters C1, C2 merge only if every distance from C1
    to v2 and from C2 to v1 is below the threshold; other cross pairs are not looked at. These distances become infinite once
    used, as does that of a refused pair.
    """
    working = distance_EE.copy()
    np.fill_diagonal(working, np.inf)
    cluster = [{e} for e in range(len(working))]
    merges = []
    while working.size:
        first, second = divmod(int(working.argmin()), len(working))
        if not working[first, second] < threshold:
            break
        one, two = cluster[first], cluster[second]
        fits = all(working[c, second] < threshold for c in one) and all(working[c, first] < threshold for c in two)
        if one is not two and fits:
            merges.append(Merge(float(working[first, second]), *sorted((first, second))))
            for c in one:
                working[c, second] = working[second, c] = np.inf
            for c in two:
                working[c, first] = working[first, c] = np.inf
            one |= two
            for c in two:
                cluster[c] = one
        working[first, second] = working[second, first] = np.inf
    return merges


def clusters_of(experts: int, merges: list[Merge]) -> list[list[int]]:
    """The partition of 0..experts-1 after `merges`; members and clusters in ascending order."""
    label = list(range(experts))
    for merge in merges:
        old, new = label[merge.second], label[merge.first]
        label = [new if which == old else which for which in label]
    groups: dict[int, list[int]] = {}
    for expert, which in enumerate(label):
        groups.setdefault(which, []).append(expert)
    return sorted(groups.values())


Round = list[Merge]


def rounds_of(sequences: list[list[Merge]], size: int) -> list[Round]:
    """The t-th merges of all groups of `size` experts, for every t that all groups reach; experts numbered over the layer."""
    shifted = [[replace(m, first=m.first + g * size, second=m.second + g * size) for m in s] for g, s in enumerate(sequences)]
    return [list(merges) for merges in zip(*shifted, strict=False)]


def blocks(distance_EE: np.ndarray, groups: int) -> list[np.ndarray]:
    """The distances within each of `groups` equal groups of neighbouring experts."""
    size = len(distance_EE) // groups
    return [distance_EE[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)]


def cut_uniform(layers: list[list[Round]], drops: list[int]) -> list[list[Round]]:
    """The first `drops[l]` rounds of each layer."""
    return [rounds[:count] for rounds, count in zip(layers, drops, strict=True)]


def cut_global(layers: list[list[Round]], most: list[int], total: int) -> list[list[Round]]:
    """The `total` closest rounds over all layers, at most `most[l]` of layer l.

    Within a layer only the prefix counts, so a round is ranked by the largest distance up to it (for complete linkage without
    groups, its own).
    """
    ranked = []
    for layer, rounds in enumerate(layers):
        heights = np.maximum.accumulate([max(m.distance for m in merges) for merges in rounds]) if rounds else []
        ranked += [(height, layer, step) for step, height in enumerate(heights) if step < most[layer]]
    taken = [0] * len(layers)
    for _, layer, _ in sorted(ranked)[:total]:
        taken[layer] += 1
    return cut_uniform(layers, taken)


def official_rounds(distances: list[np.ndarray], groups: int, enough: Callable[[list[list[Round]]], bool]) -> list[list[Round]]:
    """Rounds of the published code's merges at the lowest threshold (one for all given layers) for which `enough` holds.

    Raises StunError if even the largest threshold is not enough.
    """
    inside = [blocks(d, groups) for d in distances]
    edges = np.unique(np.concatenate([b[np.triu_indices(len(b), 1)] for of_layer in inside for b in of_layer]))
    thresholds = np.append(edges, np.inf)
    low, high = 0, len(thresholds) - 1

    def merged(at: int) -> list[list[Round]]:
        limit = float(thresholds[at])
        return [rounds_of([official_merges(b, limit) for b in of_layer], len(of_layer[0])) for of_layer in inside]

    if not enough(merged(high)):
        raise StunError("experts.method=stun_official: no threshold drops that many experts; lower experts.fraction")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(merged(middle)) else (middle + 1, high)
    return merged(high)


def select_clusters(
    method: ExpertsMethod, distances: list[np.ndarray], drops: list[int], most: list[int], one_threshold: bool, groups: int = 1
) -> list[list[list[int]]]:
    """Clusters of every layer such that exactly sum(drops) experts leave.

    `drops[l]` leave layer l, or, with `one_threshold`, as many as the common threshold says, up to `most[l]`. Both are
    multiples of `groups`, and every group loses the same number.
    """
    wanted, limits = [count // groups for count in drops], [count // groups for count in most]
    total = sum(wanted)
    if method is ExpertsMethod.stun:
        layers = [rounds_of([complete_linkage(b) for b in blocks(d, groups)], len(d) // groups) for d in distances]
    elif one_threshold:
        layers = official_rounds(distances, groups, lambda s: _available(s, limits) >= total)
    else:
        layers = [
            official_rounds([d], groups, lambda s, count=count: len(s[0]) >= count)[0]
            for d, count in zip(distances, wanted, strict=True)
        ]
    cut = cut_global(layers, limits, total) if one_threshold else cut_uniform(layers, wanted)
    return [clusters_of(len(d), [m for merges in rounds for m in merges]) for d, rounds in zip(distances, cut, strict=True)]


def _available(layers: list[list[Round]], most: list[int]) -> int:
    return sum(min(len(rounds), limit) for rounds, limit in zip(layers, most, strict=True))


def representative(cluster: list[int], squared_distance: list[float], saliency: list[float]) -> int:
    """The member nearest the cluster's mean. Both members of a pair are equally near: saliency decides, then the lower index."""
    nearness = [0.0] * len(cluster) if len(cluster) == 2 else squared_distance
    ranked = sorted(zip(nearness, (-s for s in saliency), cluster, strict=True))
    return ranked[0][2]
