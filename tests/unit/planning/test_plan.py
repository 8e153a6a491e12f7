"""Clustering, cuts and representatives against brute force and the official code's outputs."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from helpers.paths import FIXTURES
from stun.config import ExpertsMethod, Representative, Score, StunError
from stun.planning.experts.clusters import clusters_of, complete_linkage, official_merges
from stun.planning.experts.distances import expert_distance
from stun.planning.experts.scores import PRESETS, aimer_score, random_score, score_experts
from stun.planning.experts.select import Evidence, Step, cut_global, select_experts
from stun.planning.plan import LayerPlan
from stun.planning.plan_file import read_layers
from stun.pruning.representatives import nearest_member
from stun.statistics.router import router_distance

FIXTURE = FIXTURES / "stun_official"
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
    distance = expert_distance(router_distance(router), (hit.T @ hit).long(), 1.0, lambda2)
    merges = complete_linkage(distance)
    assert all(a.distance <= b.distance for a, b in itertools.pairwise(merges))
    for drop in range(experts):
        assert clusters_of(experts, merges[:drop]) == naive_complete_linkage(distance, drop)


def test_distance_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    router, counts = torch.randn(5, 8, generator=generator), torch.randint(0, 50, (5, 5), generator=generator)
    counts = counts + counts.T
    distance = expert_distance(router_distance(router), counts, 0.7, 0.3)
    mean = np.mean([counts[i, j].item() for i in range(5) for j in range(5) if i != j])
    for i, j in itertools.permutations(range(5), 2):
        apart = (router[i].double() - router[j].double()).norm().item()
        assert abs(distance[i, j] - (0.7 * apart - 0.3 * counts[i, j].item() / mean)) < 1e-6


def random_powers(experts: int, tokens: int, seed: int):
    """(powers [E, 3, 3], tokens of each expert: list of (gate, norm)), with one expert that saw none."""
    rng = np.random.default_rng(seed)
    seen = [
        [] if e == 1 else [tuple(rng.uniform(0.1, 2, size=2)) for _ in range(rng.integers(1, tokens))] for e in range(experts)
    ]
    powers = [[[sum(g**a * f**beta for g, f in own) for beta in range(3)] for a in range(3)] for own in seen]
    return torch.tensor(powers, dtype=torch.float64), seen


@pytest.mark.parametrize("score", PRESETS)
def test_scores_are_brute_force(score):
    powers, seen = random_powers(9, 12, 3)
    found = score_experts(score, powers, torch.ones(9, 3), 0, 0)
    naive = {
        Score.reap: lambda own: np.mean([g * f for g, f in own]),
        Score.man: lambda own: np.mean([f for _, f in own]),
        Score.msan: lambda own: np.mean([f * f for _, f in own]),
        Score.ean: lambda own: sum(f for _, f in own),
        Score.frequency: len,
        Score.weighted_frequency: lambda own: sum(g for g, _ in own),
        Score.energy: lambda own: sum((g * f) ** 2 for g, f in own),
    }[score]
    for expert, own in enumerate(seen):
        assert found[expert].item() == pytest.approx(naive(own) if own else 0.0)


def test_the_residual_is_what_the_best_constant_leaves():
    """... of the squared gated outputs; an expert without tokens leaves nothing."""
    rng = np.random.default_rng(0)
    seen = [[(rng.uniform(0.1, 2), rng.normal(size=5) + 2) for _ in range(count)] for count in (4, 0, 1, 9)]
    powers = [[[sum(g**a * np.linalg.norm(f) ** b for g, f in own) for b in range(3)] for a in range(3)] for own in seen]
    sums = [sum((g**2 * f for g, f in own), np.zeros(5)) for own in seen]
    tensors = torch.tensor(np.array(powers, dtype=np.float64)), torch.ones(4, 3), 0, 0, torch.tensor(np.array(sums))
    found = score_experts(Score.residual, *tensors)
    for expert, own in enumerate(seen):
        columns = np.array([g for g, _ in own])[:, None], np.array([g * f for g, f in own]).reshape(len(own), 5)
        best = np.linalg.lstsq(*columns, rcond=None)[0] if own else None
        left = float(((columns[0] @ best - columns[1]) ** 2).sum()) if own else 0.0
        assert found[expert].item() == pytest.approx(left, abs=1e-9)


@pytest.mark.parametrize("score", list(PRESETS))
def test_means_do_not_depend_on_the_scale_of_source_weights(score):
    """All weights times a constant change no order, and no mean at all; counts may be fractions below one."""
    powers, _ = random_powers(9, 12, 3)
    whole = score_experts(score, powers, torch.ones(9, 3), 0, 0)
    for scale in (0.001, 0.1, 3.0):
        scaled = score_experts(score, powers * scale, torch.ones(9, 3), 0, 0)
        assert scaled.argsort().equal(whole.argsort())
        assert PRESETS[score][1] or torch.allclose(scaled, whole)


def test_aimer_keeps_the_uneven():
    """||w||_1 / (sqrt(N) ||w||_2) is 1 where all weights are alike: such an expert goes first."""
    alike, uneven = torch.full((4, 6), 0.3), torch.zeros(4, 6)
    uneven[0, 0] = 2.0
    sums = torch.tensor([[w.abs().sum(), w.square().sum(), w.numel()] for w in (alike, uneven)])
    scores = aimer_score(sums)
    assert scores.tolist() == pytest.approx([-1.0, -1 / 24**0.5])
    assert aimer_score(torch.tensor([[0.0, 0.0, 24.0]])).item() == -1, "a dead expert goes first too"


def test_random_scores_are_seeded():
    assert torch.equal(random_score(8, 2, 5), random_score(8, 2, 5))
    assert not torch.equal(random_score(8, 2, 5), random_score(8, 3, 5))
    assert not torch.equal(random_score(8, 2, 5), random_score(8, 2, 6))


def evidence(rng, experts: int, protected=()) -> Evidence:
    points = rng.normal(size=(experts, 6)) * rng.uniform(0.5, 2)
    scores = torch.from_numpy(rng.integers(0, 6, size=experts).astype(float))  # with ties
    return Evidence(np.linalg.norm(points[:, None] - points[None], axis=-1), scores, frozenset(protected))


def select(method, layers, drops, most, one_threshold=False, groups=1, **how) -> list[LayerPlan]:
    return select_experts(method, layers, drops, most, one_threshold, groups, **how)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    group_sizes=st.lists(st.integers(4, 20), min_size=1, max_size=4),
    share=st.floats(0, 1),
    method=st.sampled_from(list(ExpertsMethod)),
    one_threshold=st.booleans(),
    floor=st.integers(1, 4),
    groups=st.sampled_from([1, 1, 2, 4]),
    guarded=st.integers(0, 3),
)
def test_budget_is_met_exactly(seed, group_sizes, share, method, one_threshold, floor, groups, guarded):
    """... whoever is protected stays; every group of a layer keeps as many, and no cluster holds members of two."""
    rng = np.random.default_rng(seed)
    shape = [groups * size for size in group_sizes]
    layers = [evidence(rng, experts, rng.choice(experts, guarded, replace=False).tolist()) for experts in shape]
    most = [groups * (size - floor) for size in group_sizes]
    drops = [groups * int(share * limit / groups) for limit in most]
    try:
        plans = select(method, layers, drops, most, one_threshold, groups)
    except StunError as error:
        # the official algorithm may never merge that far, and protection may leave too few; both say so
        assert method is ExpertsMethod.stun_official or (guarded and "protect fewer" in str(error))
        return
    assert sum(shape) - sum(len(plan.clusters) for plan in plans) == sum(drops)
    for plan, size, drop, layer in zip(plans, group_sizes, drops, layers, strict=True):
        members = list(itertools.chain(*plan.clusters))
        assert len(set(members)) == len(members) and len(plan.clusters) >= groups * floor
        assert method is ExpertsMethod.rank or sorted(members) == list(range(plan.experts))
        assert one_threshold or plan.experts - len(plan.clusters) == drop
        homes = [{expert // size for expert in cluster} for cluster in plan.clusters]
        assert all(len(home) == 1 for home in homes)
        assert len({sum(home == {group} for home in homes) for group in range(groups)}) == 1
        assert all([expert] in plan.clusters for expert in layer.protected)


@pytest.mark.parametrize("experts", [128, 512])
def test_large_layers(experts):
    rng = np.random.default_rng(experts)
    layers = [evidence(rng, experts) for _ in range(3)]
    for method in ExpertsMethod:
        plans = select(method, layers, [experts // 5] * 3, [experts - 8] * 3, True)
        assert sum(plan.experts - len(plan.clusters) for plan in plans) == 3 * (experts // 5)


def test_groups_are_clustered_apart():
    """A layer of two groups falls into the clusters of its two halves."""
    whole_layer = evidence(np.random.default_rng(5), 16)
    for method in (ExpertsMethod.stun, ExpertsMethod.rank):
        (whole,) = select(method, [whole_layer], [6], [12], False, 2)
        halves = []
        for half in (slice(8), slice(8, 16)):
            own = Evidence(whole_layer.distance_EE[half, half], whole_layer.score_E[half])
            halves.append(select(method, [own], [3], [6])[0].clusters)
        assert sorted(whole.clusters) == sorted(halves[0] + [[8 + e for e in cluster] for cluster in halves[1]])


@pytest.mark.parametrize("one_threshold", [False, True])
def test_rank_keeps_the_best(one_threshold):
    """Brute force: uniformly the lowest scores of each layer go, globally the lowest shares of the layer's mean score."""
    rng = np.random.default_rng(2)
    layers = [evidence(rng, experts) for experts in (6, 9, 12)]
    plans = select(ExpertsMethod.rank, layers, [3, 3, 3], [5, 5, 5], one_threshold)
    order = [(float(e.score_E[x]) / float(e.score_E.mean()), i, -x) for i, e in enumerate(layers) for x in range(e.experts)]
    for number, (layer, plan) in enumerate(zip(layers, plans, strict=True)):
        gone = set(range(layer.experts)) - set(plan.kept)
        worst = sorted(range(layer.experts), key=lambda x, layer=layer: (float(layer.score_E[x]), -x))
        assert gone == set(worst[: len(gone)]) and (one_threshold or len(gone) == 3)
        assert plan.clusters == [[expert] for expert in plan.kept]
        if one_threshold and len(gone) < 5:
            limit = max(entry for entry in order if -entry[2] not in plans[entry[1]].kept)[0]
            stayed = min(share for share, i, x in order if i == number and -x in plan.kept)
            assert stayed >= limit or stayed == pytest.approx(limit)


def test_representative_by_score():
    layer = evidence(np.random.default_rng(4), 20)
    (plan,) = select(ExpertsMethod.stun, [layer], [12], [18], representative=Representative.score)
    assert any(len(cluster) > 2 for cluster in plan.clusters) and not plan.nearest
    for cluster in plan.clusters:
        best = max(cluster, key=lambda e: (float(layer.score_E[e]), -e))
        assert cluster[0] == best and best in plan.kept
    assert plan.needed == set(plan.kept)


def test_nearest_is_left_open_where_weights_decide():
    layer = evidence(np.random.default_rng(4), 20)
    (plan,) = select(ExpertsMethod.stun, [layer], [12], [18])
    assert plan.nearest and plan.kept == [] and plan.needed == set(range(20))
    (pairs,) = select(ExpertsMethod.stun, [layer], [1], [18])
    assert pairs.kept and len(pairs.needed) == 19
    (few,) = select(ExpertsMethod.stun, [layer], [17], [18], kappa=3)
    assert few.mean and not select(ExpertsMethod.stun, [layer], [16], [18], kappa=3)[0].mean


def test_global_cut_takes_the_lowest_merges():
    rng = np.random.default_rng(3)
    distances = [np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (rng.normal(size=(12, 3)), 5 * rng.normal(size=(12, 3)))]
    sequences = [[Step(merge.distance, [merge]) for merge in complete_linkage(d)] for d in distances]
    cut = cut_global(sequences, [10, 10], 9)
    taken = [step.height for s, count in zip(sequences, cut, strict=True) for step in s[:count]]
    left = [step.height for s, count in zip(sequences, cut, strict=True) for step in s[count:10]]
    assert len(taken) == 9 and max(taken) <= min(left)
    assert cut[0] > cut[1]
    assert cut_global(sequences, [3, 10], 9) == [3, 6]


def test_protecting_too_many_is_an_error():
    layer = evidence(np.random.default_rng(0), 8, protected=range(6))
    with pytest.raises(StunError, match=r"3 experts are to be removed from layer 0 .*the protected ones allow only 2"):
        select(ExpertsMethod.rank, [layer], [3], [6])


def test_a_pair_is_decided_by_worth_then_by_index():
    """... never by the rounding of two equal distances to their mean."""
    experts = {e: {"part": torch.tensor(value)} for e, value in {7: [1.0, 1.0], 1: [-2.0, 0.0], 5: [1.0, -1.0]}.items()}
    assert nearest_member([7, 5], experts) == 7 and nearest_member([5, 7], experts) == 5
    assert nearest_member([1, 7, 5], experts) == 7 and nearest_member([1, 5, 7], experts) == 5
    assert nearest_member([1, 7, 5], experts | {5: {"part": torch.tensor([0.5, 0.0])}}) == 5
    close = Evidence(np.zeros((3, 3)), torch.tensor([1.0, 2.0, 2.0]))
    assert close.by_worth([0, 1, 2]) == [1, 2, 0]


PLAN = {"layers": [{"experts": 0, "clusters": []}, {"experts": 4, "clusters": [[1, 0], [2], [3]], "kept": [1, 2, 3]}]}
WRONG_PLANS = {
    "not JSON": ("{", "cannot be read as JSON"),
    "no layers": ("{}", "layers: must be there"),
    "unknown entry": ({"clustres": [[0]]}, "layer 1: unknown entries"),
    "expert in two clusters": ({"clusters": [[0, 1], [1], [3]]}, "each in one cluster at most"),
    "expert that does not exist": ({"clusters": [[0], [9]], "kept": []}, "experts 0 to 3"),
    "two of a cluster": ({"kept": [0, 1, 2, 3]}, "of every cluster one member"),
    "nobody of a cluster": ({"kept": [1, 2]}, "of every cluster one member"),
    "a float for an expert": ({"clusters": [[0.0], [2], [3]]}, "layers.1.clusters.0.0: must be a whole number"),
    "a text for a flag": ({"mean": "false"}, "layers.1.mean: must be true or false"),
    "kept is null": ({"kept": None}, "layers.1.kept: must be a list"),
    "not ascending": ({"kept": [2, 1, 3]}, "ascending"),
    "nobody": ({"kept": []}, "no expert is kept"),
}


@pytest.mark.parametrize("name", WRONG_PLANS)
def test_wrong_plan_files(tmp_path, name):
    change, message = WRONG_PLANS[name]
    content = change if isinstance(change, str) else json.dumps({"layers": [PLAN["layers"][0], {**PLAN["layers"][1], **change}]})
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(StunError, match=message):
        read_layers(tmp_path / "plan.json")


def test_plan_file(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    layers, heads, _ = read_layers(tmp_path / "plan.json")
    assert layers[1] == LayerPlan(4, [[1, 0], [2], [3]], [1, 2, 3]) and not heads
