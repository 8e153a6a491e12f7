"""Clustering of experts: merges in order of distance, by complete linkage or by the algorithm of STUN's published code."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Merge:
    """A merge of two clusters: one expert of each, and the distance at which they merge."""

    distance: float
    first: int
    second: int


def complete_linkage(distance_EE: np.ndarray) -> list[Merge]:
    """All E - 1 merges of agglomerative clustering with complete linkage; distances never decrease (STUN, algorithm 1)."""
    # Imported here: it takes a second, and only the first rank selects.
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    experts = len(distance_EE)
    if experts < 2:
        return []
    condensed = squareform(distance_EE, checks=False)
    shift = min(0.0, float(condensed.min()))  # linkage needs distances >= 0, and a shift keeps their order
    members: list[int] = list(range(experts))
    merges = []
    for left, right, height, _ in linkage(condensed - shift, method="complete"):
        first, second = sorted((members[int(left)], members[int(right)]))
        members.append(first)
        merges.append(Merge(float(height) + shift, first, second))
    return merges


def official_merges(distance_EE: np.ndarray, threshold: float) -> list[Merge]:
    """Merges of the paper's published code, which differ from complete linkage.

    Each step takes the closest pair (v1, v2) below the threshold. Its clusters C1, C2 merge only if every distance from C1 to v2
    and from C2 to v1 is below the threshold; other cross pairs are not checked. These distances become infinite once used, as
    does that of a refused pair.
    """
    # Distances change only to infinity, so the pairs are sorted once. Sets of experts are bits of integers, for speed.
    near_EE = distance_EE < threshold
    np.fill_diagonal(near_EE, False)
    near = [int.from_bytes(row.tobytes(), "little") for row in np.packbits(near_EE, axis=1, bitorder="little")]
    bit = [1 << expert for expert in range(len(near))]
    cluster, members = list(bit), [[expert] for expert in range(len(near))]
    firsts, seconds = np.nonzero(np.triu(near_EE))
    heights = distance_EE[firsts, seconds]
    order = np.argsort(heights, kind="stable")
    merges = []
    for height, v1, v2 in zip(heights[order].tolist(), firsts[order].tolist(), seconds[order].tolist(), strict=True):
        if not near[v1] & bit[v2]:
            continue
        one, two = cluster[v1], cluster[v2]
        if one != two and near[v2] & one == one and near[v1] & two == two:
            merges.append(Merge(height, v1, v2))
            near[v2] &= ~one
            near[v1] &= ~two
            for expert in members[v1]:
                near[expert] &= ~bit[v2]
            for expert in members[v2]:
                near[expert] &= ~bit[v1]
            members[v1] += members[v2]
            for expert in members[v1]:
                cluster[expert], members[expert] = one | two, members[v1]
        near[v1] &= ~bit[v2]
        near[v2] &= ~bit[v1]
    return merges


def clusters_of(experts: int, merges: list[Merge]) -> list[list[int]]:
    """Partition of 0..experts-1 after `merges`; members and clusters in ascending order."""
    cluster = [[e] for e in range(experts)]
    for merge in merges:
        one, two = cluster[merge.first], cluster[merge.second]
        one += two
        for expert in two:
            cluster[expert] = one
    return sorted(sorted(members) for members in {id(members): members for members in cluster}.values())
