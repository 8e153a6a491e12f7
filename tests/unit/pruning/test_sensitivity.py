"""Measured budgets: losses against the full model in memory, what decides over the counts, what is refused."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from statistics import median

import pytest
import torch

from helpers.launches import run_job, settings
from helpers.paths import TEXT
from helpers.stock import forbid, load_stock
from helpers.tensors import same_tensors
from helpers.uneven import steep
from helpers.zoo import make_checkpoint
from stun.config import Budget, CalibrationConfig, Dropped, ExpertsConfig, ExpertsMethod, ModelConfig, PruneConfig, StunError
from stun.planning.from_statistics import plan_from_run
from stun.planning.job import resolve
from stun.planning.make import make_plan
from stun.pruning.job import prune, take_statistics
from stun.pruning.sensitivity import losses

CALIBRATION = CalibrationConfig(path=str(TEXT), samples=16, length=40, micro_batch=2)
MEASURED = {"experts__budget": "measured", "experts__keep": 5, "target": "null", "calibration__samples": 16}


def config(source, run_dir, **experts) -> PruneConfig:
    own = ExpertsConfig(**({"method": ExpertsMethod.rank, "budget": Budget.measured, "drop": 0.25} | experts))
    return PruneConfig(ModelConfig(str(source)), replace(CALIBRATION), own, run_dir=str(run_dir))


def test_losses_are_brute_force(tmp_path, ranks):
    """What a layer of the full model gives when its router may choose survivors alone, beside what it gave before."""
    source = make_checkpoint(tmp_path / "source", "qwen3_moe")
    cfg = config(source, tmp_path / "run")
    take_statistics(cfg, ranks)
    job = resolve(cfg, ranks)
    found = losses(job, tmp_path / "budget.json", ranks)
    assert [sorted(layer) for layer in found] == [[1, 2, 3], [], [1, 2, 3]], "around the two of eight that go on average"

    one = plan_from_run(config(source, tmp_path / "run", budget=Budget.uniform), tmp_path / "plan.json")
    (described,) = one.values()
    model, held_out = load_stock(source), job.samples.tokens_ST[[4, 12]]
    states: list[list[torch.Tensor]] = []
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for layer in model.base_model.layers:
            states.append([])
            keep = lambda module, inputs, output, own=states[-1]: own.append((inputs[0], output))  # noqa: E731
            hooks.enter_context(contextlib.closing(_Handle(layer.register_forward_hook(keep))))
        model(held_out)
        for index, (layer, plan) in enumerate(zip(model.base_model.layers, described.plan.layers, strict=True)):
            if not plan.experts:
                continue
            dense = states[index][0][1].flatten(0, 1)
            with contextlib.ExitStack() as replaced:
                forbid(layer, plan.kept, replaced)
                model(held_out)
            pruned = next(output for given, output in states[index][1:] if torch.equal(given, states[index][0][0])).flatten(0, 1)
            size = dense.square().sum(-1)
            naive = (pruned - dense).square().sum(-1) / size.clamp(min=median(size.tolist()))
            assert float(naive.mean()) > 1e-4 and found[index][2] == pytest.approx(float(naive.mean()), rel=1e-3)
            states[index][1:] = []


class _Handle:
    """A hook that can be closed."""

    def __init__(self, hook):
        self.close = hook.remove


def test_counts_follow_losses_and_a_launch_goes_on_with_them(tmp_path, ranks):
    source, file = make_checkpoint(tmp_path / "source", "mixtral"), tmp_path / "budget.json"
    cfg = config(source, tmp_path / "run")
    take_statistics(cfg, ranks)
    job = resolve(cfg, ranks)
    robust, frail = {"1": 1e-4, "2": 2e-4, "3": 3e-4}, {"1": 0.1, "2": 0.2, "3": 0.4}
    file.write_text(json.dumps({"losses": [frail, robust, {"1": 0.01, "2": 0.02, "3": 0.03}]}))
    plan = make_plan(replace(job, losses=losses(job, file, ranks)), job.statistics)
    assert [layer.experts - len(layer.clusters) for layer in plan.layers] == [0, 3, 3]
    file.write_text(json.dumps({"losses": [{"1": 0.1}] * 3}))
    with pytest.raises(
        StunError, match=r"budget\.json: losses: they are those of other trials; remove the file to measure again"
    ):
        losses(job, file, ranks)
    with pytest.raises(StunError, match=r"experts\.budget=measured: it runs the model; stun prune does that"):
        plan_from_run(cfg, tmp_path / "plan.json")


@pytest.mark.parametrize("family, drop", [("deepseek_v3", 0.25), ("qwen3_moe", 0.5)])
def test_beside_novices(tmp_path, ranks, family, drop):
    """Novices may be any experts, also where routing is limited to groups; losses are those of rerouting."""
    source = make_checkpoint(tmp_path / "source", family)
    prune(config(source, tmp_path / "run", dropped=Dropped.novice, drop=drop, refit=True), ranks)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    layers = [layer for layer in plan["layers"] if layer["experts"]]
    assert sum(layer["experts"] - len(layer["kept"]) for layer in layers) == drop * sum(layer["experts"] for layer in layers)


def test_refused_before_work(tmp_path, ranks):
    source = make_checkpoint(tmp_path / "source", "mixtral")
    few = replace(config(source, tmp_path / "run"), calibration=replace(CALIBRATION, samples=7))
    with pytest.raises(StunError, match=r"experts\.budget=measured: source 'all' has 7 samples; 8 are needed"):
        prune(few, ranks)
    assert not (tmp_path / "run").exists()


@pytest.mark.ranks
@pytest.mark.slow
def test_same_bytes_on_any_number_of_ranks(tmp_path):
    source = steep(tmp_path / "source", "mixtral")
    for ranks in (1, 2):
        run_job("prune", settings(source, tmp_path / str(ranks), **MEASURED), ranks)
    same_tensors(tmp_path / "1" / "model", tmp_path / "2" / "model")
    assert (tmp_path / "1" / "budget.json").read_bytes() == (tmp_path / "2" / "budget.json").read_bytes()
    plan = json.loads((tmp_path / "1" / "plan.json").read_text())
    kept = [len(layer["kept"]) for layer in plan["layers"]]
    assert len(set(kept)) > 1 and sum(kept) == 5 * len(kept), kept
