"""Sweeps: what runs, under which names, and which statistics are shared."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import jobs
from helpers.configs import composed
from helpers.launches import run_job, settings
from helpers.paths import HELDOUT
from helpers.selections import CALIBRATION, config
from helpers.tensors import same_tensors
from stun.config import Precision, StunError
from stun.pruning.evaluated import prune_then_evaluate
from stun.pruning.job import prune
from stun.report.folder import runs_in
from stun.report.tables import report_table
from stun.run.sweep import folder_name, runs, stages
from stun.statistics.store import Statistics


def test_statistics_come_first_and_once():
    observe, rest = stages(["-m", "experts.fraction=0.1,0.2", "+calibration.seed=1", "target=0.4", "run_dir=r/s"])
    assert observe[-1] == "run_dir='r/s/statistics'" and "experts.fraction=0.1" in observe and "-m" in observe
    assert "experts.fraction=0.1,0.2" in rest and "statistics='r/s/statistics'" in rest
    assert [word for word in observe if word.startswith("+")] == ["+calibration.seed=1"]


def test_what_the_first_stream_sees_is_observed_for_every_value():
    observe, rest = stages(["-m", "calibration.samples=8,16", "calibration=a,b", "sparsify=wanda,alps", "run_dir=s"])
    assert {"calibration.samples=8,16", "calibration=a,b", "sparsify=wanda"} <= set(observe)
    samples, group = "calibration.samples,${calibration.samples}", "calibration,${hydra:runtime.choices.calibration}"
    shared = f"${{folder_name:{group}}}+${{folder_name:{samples}}}"
    assert observe[-1] == f"run_dir='s/statistics/{shared}'" and f"statistics='s/statistics/{shared}'" in rest
    assert (
        stages(["precision=auto,float32", "run_dir=s"])[0][-1] == "run_dir='s/statistics/${folder_name:precision,${precision}}'"
    )


@pytest.mark.parametrize("swept", ["experts=rank,residual", "experts.score=reap,residual"])
def test_statistics_have_what_every_score_reads(checkpoint, tmp_path, swept):
    """The residual alone reads sums of outputs."""
    words = [word for word in settings(checkpoint("mixtral"), tmp_path / "sweep") if not word.startswith("experts=")]
    run_job("prune", ["-m", *words, "experts.budget=global", swept])
    key, *values = swept.replace("=", ",").split(",")
    assert all((tmp_path / "sweep" / f"{key}-{value}" / "manifest.json").is_file() for value in values)


def test_the_dense_model_is_evaluated_with_the_statistics():
    """Once for every value that its result depends on; a file that is given is used."""
    observe, rest = stages(["experts.fraction=0.1,0.2", "task=reference", "run_dir=s"])
    assert "dense='s/dense.json'" in observe and "dense='s/dense.json'" in rest and "task=reference" in observe
    for part in stages(["target=0.1,0.2", "task.rows=3,4", "run_dir=s"]):
        assert {"dense='s/dense-${folder_name:task.rows,${task.rows}}.json'", "task.rows=3,4"} <= set(part)
    given = stages(["target=0.1,0.2", "task=reference", "dense=d.json", "run_dir=s"])
    assert all([word for word in part if "dense" in word] == ["dense=d.json"] for part in given)
    assert not any("dense" in word for part in stages(["target=0.1,0.2", "run_dir=s"]) for word in part)


def test_every_combination_is_a_run():
    lines = runs(["experts.fraction=0.1,0.2", "sparsify=wanda,magnitude", "target=0.4", "run_dir=r"])
    swept = [tuple(word for word in line if word.startswith(("experts.fraction=", "sparsify="))) for line in lines]
    assert sorted(swept) == [(f"experts.fraction={f}", f"sparsify={s}") for f in ("0.1", "0.2") for s in ("magnitude", "wanda")]


def test_runs_of_a_group_are_named_without_hydras_own_sweep():
    """As the tasks of a Slurm array compose them."""
    lines = runs(["experiment=best,quick", "target=0.5", "model=reference", "calibration=reference", "run_dir=r"])
    cfgs = [composed("prune", line) for line in lines]
    assert [cfg.run_dir for cfg in cfgs] == ["r/experiment-best", "r/experiment-quick"]
    assert [cfg.statistics for cfg in cfgs] == [f"r/statistics/experiment-{name}" for name in ("best", "quick")]


def test_folders_have_unique_names_that_need_no_quotes():
    values = [0.1, True, "wanda", Precision.auto, "2:4", "2-4", "/data/a b.jsonl", "-data-a b.jsonl", OmegaConf.create(["L0E3"])]
    values += ["L0E3", "a+target-0.1", "x" * 300, "x" * 301, "ä", "'", "=", ""]
    names = [folder_name("experts.fraction", value) for value in values]
    assert names[:4] == [f"experts.fraction-{value}" for value in ("0.1", "true", "wanda", "auto")]
    assert len(set(names)) == len(values) and names[4].startswith("experts.fraction-2-4.") and max(map(len, names)) < 100
    for name in ("+".join(names[:2]), *names):
        assert shlex.quote(name) == name
        assert OverridesParser.create().parse_override(f"model.path=runs/s/{name}/model").value() == f"runs/s/{name}/model"


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["target=0.1,0.2"], "run_dir=.* is needed"),
        (["target=0.1,(", "run_dir=r"], "target=.*mismatched"),
        ([], "run_dir"),
        (["target=0.4", "run_dir=r"], "several values"),
        (["target=0.1,0.2", "statistics=x", "run_dir=r"], "itself"),
    ],
)
def test_refused(arguments, match):
    with pytest.raises(StunError, match=match):
        stages(arguments)


def test_shared_statistics_give_the_same_result(observed, tmp_path, ranks):
    source, folder = observed
    own, shared = config(source, tmp_path / "own"), config(source, tmp_path / "shared", statistics=str(folder))
    assert prune(own, ranks)["kept"] == prune(shared, ranks)["kept"]
    same_tensors(tmp_path / "own" / "model", tmp_path / "shared" / "model")
    assert not (tmp_path / "shared" / "stats").exists()


@pytest.mark.parametrize("change", [{"samples": 7}, {"micro_batch": 1}, {"length": 41}])
def test_statistics_of_something_else_are_refused(observed, tmp_path, ranks, change):
    source, folder = observed
    cfg = config(source, tmp_path / "run", statistics=str(folder), calibration=replace(CALIBRATION, **change))
    with pytest.raises(
        StunError, match=r"stats: its statistics were collected on other inputs \((calibration_tokens|micro_batch|sources)"
    ):
        prune(cfg, ranks)
    with pytest.raises(StunError, match="holds no complete statistics"):
        Statistics(tmp_path / "nowhere").check({})


def test_report(observed, tmp_path, ranks):
    """Complete runs with what they say, others with how far they are; folders of statistics alone are no runs."""
    source, folder = observed
    prune(config(source, tmp_path / "a=1", statistics=str(folder)), ranks)
    with pytest.raises(StunError, match="holds no run folders"):
        runs_in(folder)
    (tmp_path / "b" / "progress").mkdir(parents=True)
    (tmp_path / "b" / "config.yaml").write_text("config: {}\n")
    for name, manifest in (("c", "{}"), ("d", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("config: {}\n" if name == "c" else "")
        (tmp_path / name / "manifest.json").write_text(manifest)
    found = runs_in(tmp_path)
    assert list(found) == ["a=1", "b", "c"] and found["b"] == "not complete" and "summary: must be" in found["c"]
    assert "0.4000" in report_table(found) and "not complete" in report_table(found)


@pytest.mark.slow
def test_every_run_is_evaluated_and_the_dense_model_once(checkpoint, tmp_path):
    """On the command line; repeated, it evaluates the run alone whose result is not there."""
    rows, root = tmp_path / "rows.jsonl", tmp_path / "sweep"
    rows.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:4]))
    task = {"task__path": rows, "task__max_new_tokens": 2}
    words = ["-m", *settings(checkpoint("mixtral"), root, experts__fraction="0.2,0.9", calibration__samples=2, **task)]
    said, results = run_job("prune", words).stdout, [root / f"experts.fraction-{share}" / "result.json" for share in (0.2, 0.9)]
    assert said.count("] score ") - said.count("] score 0") == 3 and said.count("KL from dense") == 2
    dense, *pruned = (json.loads(file.read_text()) for file in (root / "dense.json", *results))
    assert all(result["dense"]["average"] == dense["average"] and result["agreement"]["kl"] > 0 for result in pruned)
    table = run_job("report", [f"folder={root}"]).stdout
    for share, result in zip((0.2, 0.9), pruned, strict=True):
        assert re.search(rf"^experts.fraction-{share} .* {result['perplexity']:.3f}$", table, re.M)
    results[1].unlink()
    again = run_job("prune", words).stdout
    assert (
        again.count("] score ") - again.count("] score 0") == 1
        and json.loads(results[1].read_text())["right"] == pruned[1]["right"]
    )


@pytest.mark.parametrize(
    "words, says",
    [
        (["dense=d.json"], "task.path: a file or dataset"),
        (["task.rows=3"], "task.path: a file or dataset"),
        (["task.path=/no/rows.jsonl"], "task.path=/no/rows.jsonl: no such file"),
        (["task=reference", "task.rows=5000"], "task.rows=5000: "),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused_before_work(checkpoint, tmp_path, ranks, words, says):
    refuse(checkpoint, tmp_path, ranks, words, says)


def refuse(checkpoint, tmp_path, ranks, words, says) -> None:
    cfg = OmegaConf.to_object(composed("prune", [*settings(checkpoint("mixtral"), tmp_path / "run"), *words]))
    with pytest.raises(StunError, match=says):
        prune_then_evaluate(cfg, ranks)
    assert not (tmp_path / "run").exists()


def test_a_run_with_the_result_of_another_task_is_refused_before_work(checkpoint, tmp_path, ranks):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text('{"request": {"rows": "others"}}')
    asked = ["task=reference", "task.rows=4", f"dense={tmp_path}/dense.json"]
    cfg = OmegaConf.to_object(composed("prune", [*settings(checkpoint("mixtral"), tmp_path / "run"), *asked]))
    with pytest.raises(StunError, match=r"result\.json: holds another result \(rows: others there"):
        prune_then_evaluate(cfg, ranks)
    assert not (tmp_path / "dense.json.partial").exists()


def test_a_place_that_the_dense_result_cannot_have_is_refused_before_work(checkpoint, tmp_path, ranks):
    (tmp_path / "file").touch()
    (tmp_path / "somebody.json.partial").mkdir()
    (tmp_path / "somebody.json.partial" / "work").touch()
    asked = ["task=reference", "task.rows=4"]
    refuse(checkpoint, tmp_path, ranks, [*asked, f"dense={tmp_path}/file/dense.json"], "dense.json.partial cannot be written")
    refuse(checkpoint, tmp_path, ranks, [*asked, f"dense={tmp_path}/somebody.json"], "was not made by an evaluation")


@pytest.mark.ranks
def test_one_run_after_the_other_on_the_same_ranks(checkpoint, tmp_path):
    source = checkpoint("mixtral")
    swept = {"experts__fraction": "0.2,0.9", "sparsify": "choice(wanda)", "sparsify__scope": "choice([experts,attention])"}
    run_job("prune", ["-m", *settings(source, tmp_path / "sweep", **swept)], 2)
    run_job("prune", settings(source, tmp_path / "alone", experts__fraction=0.9, sparsify__scope="[experts,attention]"), 1)
    others = f"+sparsify-wanda+{folder_name('sparsify.scope', OmegaConf.create(['experts', 'attention']))}"
    same_tensors(tmp_path / "alone" / "model", tmp_path / "sweep" / f"experts.fraction-0.9{others}" / "model")
    assert f"experts.fraction-0.2{others}  " in run_job("report", [f"folder={tmp_path / 'sweep'}"]).stdout


@pytest.mark.slow
def test_a_run_that_no_model_could_make_is_refused_first(checkpoint, tmp_path):
    """Before the statistics that all runs share are taken."""
    words = [word for word in settings(checkpoint("mixtral"), tmp_path / "sweep") if not word.startswith("target=")]
    refused = run_job("prune", ["-m", *words, "experts.keep=6", "experts.drop=0.25,0.5"], check=False)
    assert refused.returncode == 2 and "experts.keep=6 and experts.drop=0.25: one of them alone" in refused.stderr
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("swept", ["experiment=best,quick", "model.path=a,b", "task=reference,gsm8k", "experts.keep=6,7"])
def test_runs_that_can_be_made_pass_the_check(swept):
    """Also where the folders of what they share are named by what is swept."""
    words = ["model.path=m", "calibration.path=c", "run_dir=r", "task=reference"]
    jobs._check_runs("prune", [*words, *([] if "keep" in swept else ["target=0.5"]), swept])
