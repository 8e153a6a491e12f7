"""The search for the share of experts: its error against the full model in memory, the same on any number of ranks."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from helpers.launches import run_job, settings
from helpers.paths import TEXT
from helpers.stock import forbid, load_stock
from helpers.tensors import same_tensors
from helpers.uneven import target_of
from helpers.zoo import make_checkpoint
from stun.config import CalibrationConfig, ExpertsConfig, ModelConfig, PruneConfig, SparsifyConfig, StunError
from stun.model.tensor_names import experts_of
from stun.planning.budget import best_fraction
from stun.planning.from_statistics import plan_from_run
from stun.planning.job import resolve
from stun.pruning.job import prune, take_statistics
from stun.pruning.search import search_fraction

CALIBRATION = CalibrationConfig(path=str(TEXT), samples=16, length=40, micro_batch=2)


def config(source, run_dir, target, **changes) -> PruneConfig:
    experts, calibration = ExpertsConfig(fraction="auto"), replace(CALIBRATION)
    return PruneConfig(ModelConfig(str(source)), calibration, experts, target=target, run_dir=str(run_dir), **changes)


def test_of_nearly_equal_splits_the_one_with_most_experts_is_taken():
    assert best_fraction({0.2: 1.0, 0.4: 1.05, 0.6: 1.1, 0.8: 2.0}) == 0.6


def test_error_is_brute_force(tmp_path, ranks):
    """Whole experts only: what the full model predicts when its routers may choose survivors alone."""
    source = make_checkpoint(tmp_path / "source", "qwen3_moe")
    cfg = config(source, tmp_path / "run", target_of(source, 4), sparsify=SparsifyConfig(scope=[]))
    take_statistics(cfg, ranks)
    job = resolve(cfg, ranks)
    assert job.fractions == (1.0,), "without weights to remove only whole experts reach the target"
    samples = job.samples
    (found,) = search_fraction(job, ranks).values()

    cfg.experts.fraction, cfg.experts.kappa = 1.0, 0
    cfg.experts.representative = type(cfg.experts.representative).score
    (described,) = plan_from_run(cfg, tmp_path / "plan.json").values()
    model, held_out = load_stock(source), samples.tokens_ST[[4, 12]]
    with torch.no_grad(), contextlib.ExitStack() as replaced:
        dense = model(held_out).logits.double().log_softmax(-1)
        for layer, plan in zip(model.base_model.layers, described.plan.layers, strict=True):
            if experts_of(layer):
                forbid(layer, plan.kept, replaced)
        pruned = model(held_out).logits.double().log_softmax(-1)
    naive = float((dense.exp() * (dense - pruned)).sum(-1).mean())
    assert naive > 1e-3 and found == pytest.approx(naive, rel=1e-4)


def test_candidates_are_refitted(tmp_path, ranks):
    """The joint refit brings a candidate nearer to the dense model on samples that it has not seen."""
    source, errors = make_checkpoint(tmp_path / "source", "mixtral"), {}
    for refit in (False, True):
        cfg = config(source, tmp_path / str(refit), 0.4)
        cfg.calibration.samples, cfg.experts.refit = 64, refit
        take_statistics(cfg, ranks)
        errors[refit] = search_fraction(resolve(cfg, ranks), ranks)
    assert all(errors[True][fraction] < error for fraction, error in errors[False].items() if fraction < 1)


def test_too_few_samples_to_hold_some_out(tmp_path, ranks):
    source = make_checkpoint(tmp_path / "source", "mixtral")
    cfg = config(source, tmp_path / "run", 0.4)
    cfg.calibration = CalibrationConfig(path=str(TEXT), samples=7, length=40, micro_batch=2)
    with pytest.raises(StunError, match="source 'all' has 7 samples; 8 are needed"):
        prune(cfg, ranks)


def test_unreachable_by_any_split(tmp_path, ranks):
    source = make_checkpoint(tmp_path / "source", "mixtral")
    with pytest.raises(StunError, match=r"no split of target=0\.999"):
        prune(config(source, tmp_path / "run", 0.999), ranks)
    assert not (tmp_path / "run").exists()


@pytest.mark.ranks
@pytest.mark.slow
def test_auto_on_the_command_line(checkpoint, tmp_path):
    source, how = checkpoint("mixtral"), {"experts__fraction": "auto", "calibration__samples": 17}
    for ranks in (1, 2):
        done = run_job("prune", settings(source, tmp_path / str(ranks), **how), ranks)
        assert done.stdout.count("held-out error") == 4 and done.stdout.count("<- chosen") == 1
    same_tensors(tmp_path / "1" / "model", tmp_path / "2" / "model")
    curve = (tmp_path / "1" / "search.json").read_bytes()
    assert curve == (tmp_path / "2" / "search.json").read_bytes()
    assert (tmp_path / "1" / "search.png").read_bytes().startswith(b"\x89PNG")
    error = json.loads(curve)["error"]
    plan = json.loads((tmp_path / "1" / "plan.json").read_text())
    asked = max(float(fraction) for fraction, own in error.items() if own <= 1.15 * min(error.values())) * plan["target"]
    assert plan["dropped"] / plan["parameters"] == pytest.approx(asked, abs=0.06), "as near as whole experts allow"
    refused = run_job("plan", [*settings(source, tmp_path / "1", **how), f"output={tmp_path}/p.json"], check=False)
    assert refused.returncode == 2 and "stun prune does that" in refused.stderr
