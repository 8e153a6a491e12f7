"""Every command of the README runs; the demo ends in its table and shows what it claims."""

from __future__ import annotations

import json
import re
import shlex
import sys

import pytest

from helpers.harness import HARNESS_TASK
from helpers.pages import README, commands, here, run
from helpers.paths import HELDOUT, ROOT
from helpers.tensors import load_tensors


@pytest.mark.ranks
@pytest.mark.slow
def test_demo(tmp_path):
    (command,) = commands("demo")
    job = command.split(" && ")[-1]
    output = run(here(job, {"run_dir": str(tmp_path / "demo")}))
    results = json.loads((tmp_path / "demo" / "comparison.json").read_text())
    assert list(results) == ["dense", "STUN", "experts only", "weights only"]
    dense, stun, weights = (results[name]["average"] for name in ("dense", "STUN", "weights only"))
    print(output)
    assert results["dense"]["rows"] >= 1000
    assert dense >= 0.90
    assert stun >= weights + 0.03  # four standard errors of the paired difference over 1,000 prompts
    for name in list(results)[1:]:
        assert abs(results[name]["prune"]["sparsity"] - 0.5) < 1e-4
        tensors = load_tensors(tmp_path / "demo" / name.lower().replace(" ", "-") / "model")
        inside = {key: t for key, t in tensors.items() if ".layers." in key}
        assert sum(int(t.count_nonzero()) for t in inside.values()) == results[name]["prune"]["nonzero"]
    page = tmp_path / "demo" / "report" / "index.html"
    assert page.is_file() and output.splitlines()[-1] == str(page)
    for line in (
        "exact match, average",
        "perplexity",
        "KL from dense",
        "same first choice",
        "error of the last layer",
        "nonzero share",
        "experts kept",
        "seconds to prune",
        "peak memory",
    ):
        assert line in output


@pytest.mark.ranks
@pytest.mark.slow
def test_prune_your_own_model(checkpoint, tmp_path):
    on_one_gpu, on_one_node, evaluate = commands("own")
    small = {"calibration.samples": "8", "calibration.length": "32", "calibration.path": str(HELDOUT)}
    qwen = {"model.path": str(checkpoint("qwen3_moe")), "run_dir": str(tmp_path / "qwen3")}
    run(here(on_one_gpu, {**small, **qwen}))
    arctic = {"model.path": str(checkpoint("arctic")), "run_dir": str(tmp_path / "arctic")}
    run(here(on_one_node, {**small, **arctic}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:20]))
    output = str(tmp_path / "arctic" / "result.json")
    own = {"model.path": str(tmp_path / "arctic" / "model"), "task.path": str(rows), "output": output, "task.max_new_tokens": "4"}
    assert "perplexity" in run(here(evaluate, own))
    assert 0 <= json.loads((tmp_path / "arctic" / "result.json").read_text())["average"] <= 1


@pytest.mark.slow
def test_evaluate_beside_the_dense_model(checkpoint, tmp_path):
    """The commands of the evaluation section, one after the other."""
    (both, text, harness), rows = commands("evaluate"), tmp_path / "rows.jsonl"
    rows.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:8]))
    model, dense = {"model.path": str(checkpoint("arctic"))}, str(tmp_path / "dense.json")
    small = {"task.path": str(rows), "task.max_new_tokens": "4", **model}
    first, second = both.splitlines()
    run(here(first, {**small, "output": dense}))
    assert "same first choice as dense" in run(here(second, {**small, "dense": dense, "output": str(tmp_path / "a.json")}))
    packed = {"text.path": str(HELDOUT), "text.samples": "2", "text.length": "16", "output": str(tmp_path / "b.json")}
    run(here(text, {**model, **packed}))
    assert json.loads((tmp_path / "b.json").read_text())["tokens"] == 30
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(HARNESS_TASK.format(rows=rows))
    own = {"harness.tasks": "[stun_heldout]", "harness.include_path": str(tmp_path / "tasks"), "output": str(tmp_path / "c.json")}
    assert "stun_heldout, exact_match" in run(here(harness, {**model, **own}))


@pytest.mark.slow
def test_will_it_fit(checkpoint, tmp_path):
    """The command prints every line of the README's sample and writes nothing."""
    (command,) = commands("preflight")
    small = {"calibration.path": str(HELDOUT), "calibration.samples": "8", "calibration.length": "32"}
    output = run(here(command, {**small, "model.path": str(checkpoint("arctic")), "run_dir": str(tmp_path / "run")}))
    sample = re.findall(r"^\[.*?\] (\w+)  ", README.partition("<!-- preflight -->")[2].partition("error:")[0], re.M)
    assert len(sample) == 7 and re.findall(r"^\[.*?\] (\w+)  ", output, re.M) == sample
    assert "16 ranks on 2 nodes, h100" in output and not (tmp_path / "run").exists()


@pytest.mark.ranks
@pytest.mark.slow
def test_plan_from_the_statistics_of_a_run(checkpoint, tmp_path):
    """The two commands of the plan block, after a run that took statistics."""
    plan, take = commands("plan")[0].splitlines()
    small = {"calibration.samples": "8", "calibration.length": "32", "calibration.path": str(HELDOUT)}
    model = {"model.path": str(checkpoint("arctic"))}
    run(here(commands("own")[1], {**small, **model, "run_dir": str(tmp_path / "arctic")}))
    files = {
        "run_dir": str(tmp_path / "arctic"),
        "output": str(tmp_path / "p.json"),
        "compare": str(tmp_path / "arctic" / "plan.json"),
    }
    assert "experts kept" in run(here(plan, {**model, **files}))
    run(here(take, {**small, **model, "plan": str(tmp_path / "p.json"), "run_dir": str(tmp_path / "energy")}))
    assert (tmp_path / "energy" / "manifest.json").is_file()


@pytest.mark.slow
def test_tracked_run(checkpoint, tmp_path):
    (command,) = commands("tracking")
    small = {"calibration.samples": "8", "calibration.length": "32", "calibration.path": str(HELDOUT)}
    run(here(command, {**small, "model.path": str(checkpoint("qwen3_moe")), "run_dir": str(tmp_path / "run")}))
    assert list((tmp_path / "run/tracking/wandb").glob("offline-run-*/*.wandb"))
    assert list((tmp_path / "run/tracking/tensorboard").glob("events*"))


@pytest.mark.slow
def test_benchmark(tmp_path):
    """The case of the methods prints a ratio for each."""
    small = {"calibration.samples": "8", "calibration.length": "32", "calibration.micro_batch": "2"}
    shape = {"shape.hidden": "64", "shape.expert_width": "32", "shape.layers": "2", "shape.experts": "4"}
    output = run(here(commands("benchmark")[0], {**small, **shape, "run_dir": str(tmp_path / "benchmark")}))
    result = json.loads((tmp_path / "benchmark" / "weights.json").read_text())
    assert len(result["methods"]) == 8 and all(abs(row["sparsity"] - 0.5) < 1e-4 for row in result["methods"].values())
    assert "/ read and write" in output and [f.name for f in (tmp_path / "benchmark").iterdir()] == ["weights.json"]
    output = run(here(commands("performance")[0], {**small, **shape, "run_dir": str(tmp_path / "layer")}))
    assert "observe / plain" in output and [f.name for f in (tmp_path / "layer").iterdir()] == ["layer.json"]


@pytest.mark.slow
def test_mixture_weights_and_protection_on_the_command_line(checkpoint, tmp_path):
    (command,) = commands("mixture")
    for name in ("text", "code"):
        (tmp_path / f"{name}.jsonl").write_text(HELDOUT.read_text())
        command = command.replace(f"/data/{name}.jsonl", str(tmp_path / f"{name}.jsonl"))
    small = {"calibration.samples": "9", "calibration.length": "32"}
    run(here(command, {**small, "model.path": str(checkpoint("arctic")), "run_dir": str(tmp_path / "run")}))
    about = json.loads((tmp_path / "run" / "stats" / "about.json").read_text())
    assert about["sources"] == {"math": 6, "code": 3}
    layers = json.loads((tmp_path / "run" / "plan.json").read_text())["layers"]
    assert 3 in layers[0]["kept"] and 2 in layers[1]["kept"]


@pytest.mark.slow
def test_train_another_model(tmp_path):
    """The command that made the second model of docs/selection.md, for two steps; the result can be pruned."""
    train, _ = commands("train", (ROOT / "docs" / "selection.md").read_text())[0].splitlines()
    words = [*shlex.split(train)[1:], f"output={tmp_path / 'tiny'}", "steps=2", "heldout_samples=50", "calibration_samples=60"]
    words = [word for word in words if word != "output=runs/qwen3_tiny"]
    run([sys.executable, *words])
    model = {"model.path": str(tmp_path / "tiny" / "model"), "calibration.path": str(tmp_path / "tiny" / "calibration.jsonl")}
    small = {"calibration.samples": "8", "calibration.length": "32", "run_dir": str(tmp_path / "run"), "target": "0.6"}
    run(here(commands("own")[0], {**model, **small}))


def test_ci_runs_the_readme_test_command():
    (command,) = commands("tests")
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install") and command.endswith("-m pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_settings_in_the_readme_exist():
    from stun.config import PushConfig
    from stun.evaluation.config import EvaluateConfig

    first, second = (table.partition("\n\n")[0] for table in README.split("| setting |")[1:])
    for table, whole, known in ((first, PushConfig, "experts.lambda2"), (second, EvaluateConfig, "task.batch")):
        keys = re.findall(r"`([\w.]+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
        assert known in keys
        check_keys(keys, whole)


def check_keys(keys: list[str], whole: type) -> None:
    for key in (f"calibration{key}" if key.startswith(".") else key for key in keys):
        node = whole()
        for part in key.split("."):
            assert hasattr(node, part) or part in node.__dataclass_fields__, key
            node = getattr(node, part, None)
