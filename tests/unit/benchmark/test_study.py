"""The study of selections: it runs, continues, and the committed table is what its committed scores say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from helpers.configs import composed
from helpers.launches import run_job
from helpers.paths import HELDOUT, ROOT, TEXT
from helpers.selections import config
from helpers.zoo import make_checkpoint
from stun.benchmark.config import StudyConfig
from stun.benchmark.study import _method_configs, markdown, study
from stun.config import CalibrationConfig, SparsifyConfig, SparsifyMethod, StunError
from stun.evaluation.config import EvaluateConfig, TaskConfig
from stun.evaluation.job import evaluate


@pytest.mark.parametrize("name", ["selection", "selection-qwen3"])
def test_committed_table_is_rendered_from_committed_scores(name):
    scores = json.loads((ROOT / "docs" / f"{name}.json").read_text())
    page = (ROOT / "docs" / "selection.md").read_text()
    assert markdown(scores, ["odd", "even"]).strip() in page
    assert f"scores=docs/{name}.json" in page


def test_committed_tables_of_weights():
    scores, cost = (json.loads((ROOT / "docs" / f"{name}.json").read_text()) for name in ("weights", "weights-cost"))
    page = (ROOT / "docs" / "weights.md").read_text()
    assert markdown(scores, ["odd", "even", "perplexity"]).strip() in page and "scores=docs/weights.json" in page
    assert cost["results"].keys() == scores["results"].keys()
    for method, ((row,),) in ((method, tuple(by_target.values())) for method, by_target in cost["results"].items()):
        assert f"| {method} | {row['seconds']:.1f} | {row['GiB']:.2f} |" in page


def test_markdown():
    results = [{"even": 0.1, "odd": 0.2, "seconds": 1.0}, {"even": 0.3, "odd": 0.4, "seconds": 2.0}]
    scores = {"dense": {"even": 0.9, "odd": 0.8}, "seeds": [0, 1], "results": {"a": {"0.5": results}}}
    table = markdown(scores, ["odd", "even", "seconds"])
    assert "| a | 0.300 ± 0.141 |" in table and "| a | 0.200 ± 0.141 |" in table
    assert table.index("0.300") < table.index("0.200") and "Dense: 0.800" in table
    assert "| a | 1.5 |" in table


@pytest.mark.parametrize("name", ["study_experts", "study_seeds", "study_default", "study_domain"])
def test_every_method_of_a_study_can_do_what_is_asked(name):
    """... on the model that it names."""
    cfg = OmegaConf.to_object(composed(name, []))
    assert _method_configs(cfg).keys() == cfg.methods.keys()


@pytest.mark.slow
def test_experts_alone(checkpoint, ranks, tmp_path):
    """`drops` removes that share of the experts and no single weight; perplexity is that of `text`."""
    (tmp_path / "rows.jsonl").write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:4]))
    base = config(checkpoint("mixtral"), tmp_path / "study", None)
    text = CalibrationConfig(path=str(TEXT), samples=2, length=30)
    own = {key: getattr(base, key) for key in ("model", "calibration", "experts", "run_dir")}
    task = TaskConfig(str(tmp_path / "rows.jsonl"), max_new_tokens=2)
    cfg = StudyConfig(**own, task=task, text=text, methods={"REAP": ["experts.method=rank"]}, drops=[0.5], seeds=[0])
    scores = study(cfg, ranks)
    dense = evaluate(EvaluateConfig(base.model, text=text, output=str(tmp_path / "text.json")), ranks)
    assert scores["dense"]["perplexity"] == dense["perplexity"]
    (cell,) = scores["results"]["REAP"]["0.5"]
    pruned = json.loads((tmp_path / "study" / "seed-0" / "0.5 REAP.json").read_text())["result"]["prune"]
    assert pruned["kept"] == [4, 4, 4] and pruned["ratio"] == 0 < cell["sparsity"] == pruned["sparsity"]
    assert "| experts removed | 0.5 |" in markdown(scores, ["odd"])
    with pytest.raises(StunError, match=r"settings\.sparsify\.method: wanda there, magnitude now"):
        study(replace(cfg, sparsify=SparsifyConfig(SparsifyMethod.magnitude)), ranks)
    for changes in ({"targets": [0.5]}, {"drops": []}):
        with pytest.raises(StunError, match="either targets or drops"):
            study(replace(cfg, **changes), ranks)


@pytest.mark.ranks
@pytest.mark.slow
def test_study_runs_and_continues(tmp_path):
    """Every method at every sparsity and seed from one stream a seed; a second call computes nothing again."""
    source = make_checkpoint(tmp_path / "source", "mixtral")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:12]))
    arguments = [
        f"model.path={source}",
        f"task.path={rows}",
        "task.max_new_tokens=2",
        "calibration.samples=8",
        "calibration.length=40",
        "targets=[0.3]",
        "seeds=[0,1]",
        "experts.budget=uniform",
        "~methods",
        "+methods={weights:['experts.fraction=0'],rank:['experts.method=rank'],owl:['sparsify.ratios=owl']}",
        f"run_dir={tmp_path / 'study'}",
        f"scores={tmp_path / 'scores.json'}",
    ]
    first = run_job("study", arguments, 2)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {m: {t: len(pairs) for t, pairs in by.items()} for m, by in scores["results"].items()} == {
        m: {"0.3": 2} for m in ("weights", "rank", "owl")
    }
    assert first.stdout.count("prune 01/3") == 6 and first.stdout.count("observe 01/3") == 2
    assert not list((tmp_path / "study").glob("seed-*/*/model")), "pruned checkpoints are not kept"
    second = run_job("study", arguments, 1)
    assert "prune 01/3" not in second.stdout and "observe 01/3" not in second.stdout
    assert markdown(scores, ["odd", "even"]).strip() in second.stdout
    other = [a.replace("rank:['experts.method=rank']", "rank:['experts.score=ean']") for a in arguments]
    refused = run_job("study", other, check=False)
    assert refused.returncode == 2 and "choose another run_dir" in refused.stderr, "a name is no proof of what was done"
