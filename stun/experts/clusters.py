"""Merging alike experts: a sequence of merges of growing distance, by complete linkage or by STUN's published code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform


@dataclass(frozen=True)
class Merge:
    """Two clusters become one: the pair of experts that names them, and the distance at which it happened."""

    distance: float
    first: int
    second: int


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
    used, as does that of a refused pair. Since a distance only ever becomes infinite, the pairs are sorted once.
    """
    working = distance_EE.copy()
    np.fill_diagonal(working, np.inf)
    experts = len(working)
    pairs = np.flatnonzero(working < threshold)
    pairs = pairs[np.argsort(working.ravel()[pairs], kind="stable")]
    cluster = [[e] for e in range(experts)]
    merges = []
    for first, second in zip((pairs // experts).tolist(), (pairs % experts).tolist(), strict=True):
        if not working[first, second] < threshold:
            continue
        one, two = cluster[first], cluster[second]
        fits = (working[one, second] < threshold).all() and (working[two, first] < threshold).all()
        if one is not two and fits:
            merges.append(Merge(float(working[first, second]), *sorted((first, second))))
            working[one, second] = working[second, one] = np.inf
            working[two, first] = working[first, two] = np.inf
            one += two
            for c in two:
                cluster[c] = one
        working[first, second] = working[second, first] = np.inf
    return merges


def clusters_of(experts: int, merges: list[Merge]) -> list[list[int]]:
    """The partition of 0..experts-1 after `merges`; members and clusters in ascending order."""
    cluster = [[e] for e in range(experts)]
    for merge in merges:
        one, two = cluster[merge.first], cluster[merge.second]
        one += two
        for expert in two:
            cluster[expert] = one
    return sorted(sorted(members) for members in {id(members): members for members in cluster}.values())
