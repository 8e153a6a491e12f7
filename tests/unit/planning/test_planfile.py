"""Plans as files: made from saved statistics, edited by hand, compared, taken back, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from helpers.launches import run_job, settings
from helpers.selections import config
from helpers.tensors import load_tensors, same_tensors
from helpers.uneven import target_of
from helpers.zoo import make_checkpoint
from stun.config import (
    Budget,
    ExpertsConfig,
    ExpertsMethod,
    Representative,
    Score,
    SparsifyConfig,
    StunError,
)
from stun.planning.from_statistics import plan_from_run
from stun.pruning.job import prune


@pytest.mark.slow
@pytest.mark.parametrize(
    "experts",
    [
        ExpertsConfig(),
        ExpertsConfig(method=ExpertsMethod.rank, score=Score.msan),
        ExpertsConfig(representative=Representative.score, lambda2=1.0, budget=Budget["global"]),
        ExpertsConfig(fraction=1.0, kappa=8),
    ],
    ids=["stun", "rank", "cluster_score", "reconstructed"],
)
def test_a_plan_file_gives_what_the_run_itself_does(observed, tmp_path, ranks, experts):
    source, run_dir = observed
    cfg = config(source, run_dir, experts=experts)
    plan_from_run(cfg, tmp_path / "plan.json")
    prune(replace(cfg, run_dir=str(tmp_path / "own")), ranks)
    prune(replace(cfg, run_dir=str(tmp_path / "given"), plan=str(tmp_path / "plan.json")), ranks)
    same_tensors(tmp_path / "own" / "model", tmp_path / "given" / "model")
    assert not (tmp_path / "given" / "stats").exists(), "no first stream for a given plan"
    finished = replace(cfg, run_dir=str(tmp_path / "finished"), plan=str(tmp_path / "own" / "plan.json"))
    prune(finished, ranks)
    same_tensors(tmp_path / "own" / "model", tmp_path / "finished" / "model")


def test_a_plan_edited_by_hand(observed, tmp_path, ranks):
    source, run_dir = observed
    cfg = config(source, run_dir, experts=ExpertsConfig(representative=Representative.score), sparsify=SparsifyConfig(scope=[]))
    cfg = replace(cfg, target=target_of(source, 9), experts=replace(cfg.experts, fraction=1.0))
    plan_from_run(cfg, tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    layer = content["layers"][1]
    pair = next(cluster for cluster in layer["clusters"] if len(cluster) > 1)
    layer["kept"] = sorted(set(layer["kept"]) - {pair[0]} | {pair[1]})
    (tmp_path / "plan.json").write_text(json.dumps(content))
    target = content["dropped"] / content["parameters"]
    prune(replace(cfg, target=target, run_dir=str(tmp_path / "run"), plan=str(tmp_path / "plan.json")), ranks)
    before, after = load_tensors(source), load_tensors(tmp_path / "run" / "model")
    moe = "model.layers.1.block_sparse_moe."
    number = layer["kept"].index(pair[1])
    assert torch.equal(after[f"{moe}experts.{number}.w1.weight"], before[f"{moe}experts.{pair[1]}.w1.weight"])
    assert torch.equal(after[f"{moe}gate.weight"], before[f"{moe}gate.weight"][layer["kept"]])


def edited(content: dict, change) -> dict:
    change(content)
    return content


PLAN_EDITS = {
    "another model": (lambda c: c["layers"].pop(), "2 layers and 0 prediction heads; the model has 3"),
    "another number of experts": (
        lambda c: c["layers"][0].update(experts=11),
        "each in one cluster",
    ),
    "too few stay": (lambda c: c["layers"][0].update(clusters=[[0]], kept=[0]), "keeps 1 experts; at least 2 are needed"),
    "more leave than the target": (
        lambda c: [layer.update(clusters=[[0], [1]], kept=[0, 1]) for layer in c["layers"]],
        "more than target=0.4",
    ),
}


@pytest.mark.parametrize("name", PLAN_EDITS)
def test_plans_that_do_not_fit_are_refused_before_work(observed, tmp_path, ranks, name):
    change, message = PLAN_EDITS[name]
    source, run_dir = observed
    plan_from_run(config(source, run_dir, experts=ExpertsConfig(representative=Representative.score)), tmp_path / "plan.json")
    content = edited(json.loads((tmp_path / "plan.json").read_text()), change)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(StunError, match=message):
        prune(config(source, tmp_path / "run", plan=str(tmp_path / "plan.json")), ranks)
    assert not (tmp_path / "run").exists()


def test_statistics_of_another_model_are_refused(observed, tmp_path):
    other = make_checkpoint(tmp_path / "other", "mixtral")
    with pytest.raises(StunError, match="belong to another model"):
        plan_from_run(config(other, observed[1]), tmp_path / "plan.json")
    with pytest.raises(StunError, match="no complete statistics"):
        plan_from_run(config(observed[0], tmp_path / "nowhere"), tmp_path / "plan.json")


def test_the_plan_of_the_run_itself_is_not_overwritten(observed, tmp_path):
    source, run_dir = observed
    with pytest.raises(StunError, match="choose another file"):
        plan_from_run(config(source, run_dir), run_dir / "plan.json")
    plan_from_run(config(source, run_dir, 0.6), tmp_path / "more.json")
    with pytest.raises(StunError, match="choose another file"):
        plan_from_run(config(source, run_dir), tmp_path / "more.json", str(tmp_path / "more.json"))
    described = plan_from_run(config(source, run_dir, 0.3), tmp_path / "less.json", str(tmp_path / "more.json"))
    assert [d.plan.target for d in described.values()] == [0.3, 0.6], "each by its own target"
    (tmp_path / "folder").mkdir()
    with pytest.raises(StunError, match="something else is there"):
        plan_from_run(config(source, run_dir), tmp_path / "folder")


def test_broken_statistics(observed, tmp_path):
    source, run_dir = observed
    shutil.copytree(run_dir, tmp_path / "copy")
    (tmp_path / "copy" / "stats" / "layer-00001.safetensors").write_bytes(b"torn")
    with pytest.raises(StunError, match=r"layer-00001\.safetensors: truncated"):
        plan_from_run(config(source, tmp_path / "copy"), tmp_path / "plan.json")
    (tmp_path / "copy" / "stats" / "about.json").write_text("{")
    with pytest.raises(StunError, match=r"about\.json: cannot be read"):
        plan_from_run(config(source, tmp_path / "copy"), tmp_path / "plan.json")


@pytest.mark.ranks
def test_plan_job(observed, tmp_path):
    """The command line: a plan, its counts and size, beside another plan; and a run that takes it."""
    source, run_dir = observed
    shared = [a for a in settings(source, run_dir) if not a.startswith("calibration")]
    first = run_job("plan", [*shared, f"output={tmp_path}/a.json", "experts=cluster_score"])
    both = run_job("plan", [*shared, f"output={tmp_path}/b.json", "experts=rank", f"compare={tmp_path}/a.json"])
    assert "experts kept" in first.stdout and "size on disk" in first.stdout
    assert "the same)" in both.stdout and f"{tmp_path}/a.json" in both.stdout
    run_job("prune", [*settings(source, tmp_path / "run"), f"plan={tmp_path}/b.json"], 2)
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert written["layers"] == json.loads((tmp_path / "b.json").read_text())["layers"]
