"""Selections from one saved stream of statistics: every method and score, protected experts, impossible requests."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from helpers.selections import config
from helpers.tensors import same_tensors
from stun.config import (
    Budget,
    ExpertsConfig,
    ExpertsMethod,
    ProtectConfig,
    Representative,
    Score,
    StunError,
)
from stun.planning.from_statistics import plan_from_run
from stun.planning.plan_file import read_layers
from stun.pruning.job import prune
from stun.statistics.store import Statistics


@pytest.mark.slow
def test_one_stream_serves_every_selection(observed, tmp_path):
    source, run_dir = observed
    before = sorted((f.name, f.stat().st_mtime_ns) for f in (run_dir / "stats").iterdir())
    similarities = [{}, {"lambda2": 1.0}, {"lambda1": 0.0, "lambda2": 1.0}]
    seen, from_statistics = {}, [Budget.uniform, Budget["global"]]
    for method, score, budget, representative in itertools.product(ExpertsMethod, Score, from_statistics, Representative):
        # What is similar does not depend on the score.
        for number, similarity in enumerate(similarities if score is Score.reap else [{}]):
            experts = ExpertsConfig(method=method, score=score, budget=budget, representative=representative, **similarity)
            cfg = config(source, run_dir, experts=experts)
            if score is Score.index and (method is ExpertsMethod.rank or representative is Representative.score):
                with pytest.raises(StunError, match=r"experts.score=index.*a score that differs"):
                    plan_from_run(cfg, tmp_path / "plan.json")
                continue
            (described,) = plan_from_run(cfg, tmp_path / "plan.json").values()
            plan = described.plan
            assert plan.dropped + plan.zeros == round(0.4 * plan.parameters)
            kept = [len(layer.clusters) for layer in plan.layers]
            assert kept == [9, 9, 9] or (budget is Budget["global"] and sum(kept) < 30)
            seen[method, score, budget, representative, number] = json.dumps([layer.clusters for layer in plan.layers])
    assert sorted((f.name, f.stat().st_mtime_ns) for f in (run_dir / "stats").iterdir()) == before
    assert len(set(seen.values())) > 30, "the methods must differ, or this proves nothing"


@pytest.mark.parametrize("budget", Budget)
def test_router_rows_alone_take_no_forward(observed, tmp_path, ranks, budget):
    """One stream in place of two, and the same tensors as from statistics."""
    source, run_dir = observed
    experts = ExpertsConfig(score=Score.index, budget=budget, fraction=0.5)
    alone = prune(config(source, tmp_path / "alone", experts=experts), ranks)
    shared = prune(config(source, tmp_path / "shared", experts=experts, statistics=str(run_dir)), ranks)
    streams = ["budget", "prune"] if budget is Budget.measured else ["prune"]
    assert list(alone["phases"]) == streams and not (tmp_path / "alone" / "stats").exists()
    assert alone["kept"] == shared["kept"] and sum(alone["kept"]) < sum(alone["experts"])
    same_tensors(tmp_path / "alone" / "model", tmp_path / "shared" / "model")


def test_protected_experts_stay(observed, tmp_path, ranks):
    source, run_dir = observed
    stats = [Statistics(run_dir / "stats").load(layer) for layer in range(3)]
    peaks = torch.cat([layer["peak"][0] for layer in stats])
    extreme = max(float(peaks.max()) / 10, float(torch.quantile(peaks, 0.995)))
    shares = [layer["coactivation"][0].diagonal().double() / (8 * 40) for layer in stats]
    rules = {
        "list": (ProtectConfig(experts=["L0E3", "L2E11"]), [{3}, set(), {11}]),
        "super": (ProtectConfig(super_experts=True), [set((s["peak"][0] > extreme).nonzero().flatten().tolist()) for s in stats]),
        "domain": (ProtectConfig(domain_share=0.3), [set((share >= 0.3).nonzero().flatten().tolist()) for share in shares]),
    }
    for method, (name, (protect, expected)) in itertools.product(ExpertsMethod, rules.items()):
        assert any(expected), name
        experts = ExpertsConfig(method=method, score=Score.random, protect=protect, representative=Representative.score)
        plan_from_run(config(source, run_dir, experts=experts), tmp_path / "plan.json")
        for layer, stay in zip(read_layers(tmp_path / "plan.json")[0], expected, strict=True):
            assert stay <= set(layer.kept) and all([expert] in layer.clusters for expert in stay), (method, name)
    for wrong in ("3", "L0E12", "L7E0", "0.1", "L0E²"):
        with pytest.raises(StunError, match=f"{wrong!r} names no expert"):
            experts = ExpertsConfig(protect=ProtectConfig(experts=[wrong]))
            prune(config(source, tmp_path / "run", experts=experts), ranks)
        assert not (tmp_path / "run").exists()


LISTED = [f"L0E{expert}" for expert in range(11)]


IMPOSSIBLE = {
    "listed too many": ({"protect": ProtectConfig(experts=LISTED)}, "layer 0: 3 experts are to be removed.*allows 0; list fewer"),
    "listed too many of all": (
        {"protect": ProtectConfig(experts=[f"L{i}E{e}" for i in range(3) for e in range(11)]), "budget": Budget["global"]},
        "experts are to be removed, but experts.protect.experts allows 0",
    ),
    "infinite lambda": ({"lambda1": float("inf")}, "experts.lambda1=inf"),
    "no number": ({"lambda2": float("nan")}, r"experts\.lambda2=nan"),
    "source that is none": ({"source_weights": {"code": 1.0}}, "sources are all"),
    "infinite weight": ({"source_weights": {"all": float("inf")}}, "source_weights.all=inf"),
    "auto for nothing": ({"fraction": "auto", "target": 0.0}, "auto for a target above 0"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_selections_are_refused_before_work(observed, tmp_path, ranks, name):
    change, message = IMPOSSIBLE[name]
    target = change.get("target", 0.4)
    experts = ExpertsConfig(**{key: value for key, value in change.items() if key != "target"})
    with pytest.raises(StunError, match=message):
        prune(config(observed[0], tmp_path / "run", target, experts), ranks)
    assert not (tmp_path / "run").exists()


def test_large_seeds(observed, tmp_path):
    experts = ExpertsConfig(method=ExpertsMethod.rank, score=Score.random, seed=10**15)
    assert plan_from_run(config(*observed, experts=experts), tmp_path / "plan.json")


def test_a_run_interrupted_at_its_start_continues(observed, tmp_path, ranks, monkeypatch):
    """Killed while it wrote what it is: nothing else is in its folder yet."""
    cfg = config(observed[0], tmp_path / "run")

    def killed(file, write):
        write(file.with_name(f".{file.name}.tmp"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("stun.run.folder.write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(cfg, ranks)
    assert prune(cfg, ranks)["sparsity"] == pytest.approx(0.4, abs=1e-4)
