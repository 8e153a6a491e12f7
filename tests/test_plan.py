"""Clustering, cuts and representatives against brute force and the official code's outputs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from stun.config import ExpertsMethod, StunError
from stun.plan import (
    clusters_of,
    complete_linkage,
    cut_global,
    expert_distance,
    official_merges,
    representative,
    select_clusters,
)

FIXTURE = Path(__file__).parent / "fixtures" / "stun_official"
CASES = json.loads((FIXTURE / "clusters.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['case']}-{c['distance']}-{c['experts']}")
def test_official_clusters(case):
    inputs = load_file(FIXTURE / "inputs.safetensors")
    router = inputs[f"router.{case['case']}"]
    if case["distance"] == "router":
        distance = torch.cdist(router, router).numpy()
    else:
        counts = inputs[f"coactivation.{case['case']}"].float()
        distance = (-counts / counts.abs().mean()).numpy()
    found = clusters_of(case["experts"], official_merges(distance, case["threshold"]))
    assert found == sorted(sorted(cluster) for cluster in case["clusters"])


def naive_complete_linkage(distance: np.ndarray, drop: int) -> list[list[int]]:
    clusters = [[e] for e in range(len(distance))]
    for _ in range(drop):
        pairs = itertools.combinations(range(len(clusters)), 2)
        far = {(a, b): max(distance[i, j] for i in clusters[a] for j in clusters[b]) for a, b in pairs}
        a, b = min(far, key=far.get)
        clusters[a] = sorted(clusters[a] + clusters[b])
        del clusters[b]
    return sorted(clusters)


@pytest.mark.parametrize("experts", [4, 7, 16, 33])
@pytest.mark.parametrize("lambda2", [0.0, 1.0])
def test_complete_linkage_is_brute_force(experts, lambda2):
    generator = torch.Generator().manual_seed(experts)
    router = torch.randn(experts, 24, generator=generator)
    hits = torch.rand(400, experts, generator=generator).topk(3).indices
    hit = torch.zeros(400, experts).scatter_(1, hits, 1)
    distance = expert_distance(router, (hit.T @ hit).long(), 1.0, lambda2)
    merges = complete_linkage(distance)
    assert all(a.distance <= b.distance for a, b in itertools.pairwise(merges))
    for drop in range(experts):
        assert clusters_of(experts, merges[:drop]) == naive_complete_linkage(distance, drop)


def test_distance_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    router, counts = torch.randn(5, 8, generator=generator), torch.randint(0, 50, (5, 5), generator=generator)
    counts = counts + counts.T
    distance = expert_distance(router, counts, 0.7, 0.3)
    mean = np.mean([counts[i, j].item() for i in range(5) for j in range(5) if i != j])
    for i, j in itertools.permutations(range(5), 2):
        expected = 0.7 * (router[i].double() - router[j].double()).norm().item() - 0.3 * counts[i, j].item() / mean
        assert abs(distance[i, j] - expected) < 1e-9


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    group_sizes=st.lists(st.integers(4, 20), min_size=1, max_size=4),
    share=st.floats(0, 1),
    method=st.sampled_from(list(ExpertsMethod)),
    one_threshold=st.booleans(),
    floor=st.integers(1, 4),
    groups=st.sampled_from([1, 1, 2, 4]),
)
def test_budget_is_met_exactly(seed, group_sizes, share, method, one_threshold, floor, groups):
    """... and with groups, every group of a layer keeps as many, and no cluster holds members of two."""
    rng = np.random.default_rng(seed)
    shape, distances = [groups * size for size in group_sizes], []
    for experts in shape:
        points = rng.normal(size=(experts, 6)) * rng.uniform(0.5, 2)
        distances.append(np.linalg.norm(points[:, None] - points[None], axis=-1))
    most = [groups * (size - floor) for size in group_sizes]
    drops = [groups * int(share * limit / groups) for limit in most]
    try:
        clusters = select_clusters(method, distances, drops, most, one_threshold, groups)
    except StunError:
        assert method is ExpertsMethod.stun_official  # may never merge that far, and says so
        return
    assert sum(shape) - sum(map(len, clusters)) == sum(drops)
    for experts, size, own, drop in zip(shape, group_sizes, clusters, drops, strict=True):
        assert sorted(itertools.chain(*own)) == list(range(experts)) and len(own) >= groups * floor
        assert one_threshold or experts - len(own) == drop
        homes = [{expert // size for expert in cluster} for cluster in own]
        assert all(len(home) == 1 for home in homes)
        assert len({sum(home == {group} for home in homes) for group in range(groups)}) == 1


def test_groups_are_clustered_apart():
    """A layer of two groups falls into the clusters of its two halves."""
    rng = np.random.default_rng(5)
    points = rng.normal(size=(16, 4))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    for method in ExpertsMethod:
        (whole,) = select_clusters(method, [distance], [6], [12], False, 2)
        halves = [select_clusters(method, [distance[h, h]], [3], [6], False)[0] for h in (slice(8), slice(8, 16))]
        assert whole == sorted(halves[0] + [[8 + e for e in cluster] for cluster in halves[1]])


def test_global_cut_takes_the_lowest_merges():
    rng = np.random.default_rng(3)
    distances = [np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (rng.normal(size=(12, 3)), 5 * rng.normal(size=(12, 3)))]
    sequences = [[[merge] for merge in complete_linkage(d)] for d in distances]
    cut = cut_global(sequences, [10, 10], 9)
    taken = [m.distance for s in cut for (m,) in s]
    left = [m.distance for s, c in zip(sequences, cut, strict=True) for (m,) in s[len(c) : 10]]
    assert len(taken) == 9 and max(taken) <= min(left)
    assert len(cut[0]) > len(cut[1])
    limited = cut_global(sequences, [3, 10], 9)
    assert [len(c) for c in limited] == [3, 6]


def test_a_pair_is_decided_by_saliency_then_by_index():
    rounding = [0.1 + 1e-9, 0.1]
    assert representative([4, 9], rounding, [2.0, 1.0]) == 4
    assert representative([4, 9], rounding, [1.0, 2.0]) == 9
    assert representative([4, 9], rounding, [1.0, 1.0]) == 4
    assert representative([1, 5, 7], [3.0, 1.0, 2.0], [9.0, 0.0, 9.0]) == 5
