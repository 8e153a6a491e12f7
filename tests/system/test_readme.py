"""Every command of the README runs; test_wheel.py has the demo."""

from __future__ import annotations

import json
import re
import shlex
import sys

import pytest

from helpers.harness import HARNESS_TASK
from helpers.pages import README, commands, here, page, run
from helpers.paths import HELDOUT, ROOT


@pytest.mark.ranks
@pytest.mark.slow
def test_prune_your_own_model(checkpoint, tmp_path):
    on_one_gpu, on_one_node = commands("own")
    dense, evaluate, report = commands("evaluate")[0].splitlines()
    small = {"calibration.samples": "8", "calibration.length": "32", "calibration.path": str(HELDOUT)}
    qwen = {"model.path": str(checkpoint("qwen3_moe")), "run_dir": str(tmp_path / "qwen3")}
    run(here(on_one_gpu, {**small, **qwen}))
    arctic = {"model.path": str(checkpoint("arctic")), "run_dir": str(tmp_path / "arctic")}
    run(here(on_one_node, {**small, **arctic}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:20]))
    task = {"task.path": str(rows), "task.max_new_tokens": "4"}
    run(here(dense, {**task, "model.path": str(checkpoint("arctic")), "output": str(tmp_path / "dense.json")}))
    pruned = {"model.path": str(tmp_path / "arctic" / "model"), "output": str(tmp_path / "arctic" / "result.json")}
    assert "same first choice" in run(here(evaluate, {**task, **pruned, "dense": str(tmp_path / "dense.json")}))
    assert 0 <= json.loads((tmp_path / "arctic" / "result.json").read_text())["average"] <= 1
    assert str(tmp_path / "arctic" / "report") in run(here(report, {"folder": str(tmp_path / "arctic")}))


@pytest.mark.slow
def test_evaluate_beside_the_dense_model(checkpoint, tmp_path):
    """The commands of the page on evaluation, one after the other."""
    (both, text, harness), rows = commands("evaluate", page("evaluation")), tmp_path / "rows.jsonl"
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
    """The command describes another cluster and writes nothing."""
    (command,) = commands("preflight", page("runs"))
    small = {"calibration.path": str(HELDOUT), "calibration.samples": "8", "calibration.length": "32"}
    output = run(here(command, {**small, "model.path": str(checkpoint("arctic")), "run_dir": str(tmp_path / "run")}))
    said = re.findall(r"^\[.*?\] (\w+)  ", output, re.M)
    assert said == ["launch", "model", "result", "loads", "method", "note", "reads", "writes", "memory", "disk", "time"]
    assert "16 ranks on 2 nodes, h100" in output and not (tmp_path / "run").exists()


@pytest.mark.ranks
@pytest.mark.slow
def test_plan_from_the_statistics_of_a_run(checkpoint, tmp_path):
    """The two commands of the plan block, after a run that took statistics."""
    plan, take = commands("plan", page("runs"))[0].splitlines()
    small = {"calibration.samples": "8", "calibration.length": "32", "calibration.path": str(HELDOUT)}
    model = {"model.path": str(checkpoint("arctic"))}
    run(here(commands("own")[1], {**small, **model, "run_dir": str(tmp_path / "arctic")}))
    files = {
        "run_dir": str(tmp_path / "arctic"),
        "output": str(tmp_path / "p.json"),
        "compare": str(tmp_path / "arctic" / "plan.json"),
    }
    assert "experts kept" in run(here(plan, {**model, **files}))
    run(here(take, {**small, **model, "plan": str(tmp_path / "p.json"), "run_dir": str(tmp_path / "reap")}))
    assert (tmp_path / "reap" / "manifest.json").is_file()


@pytest.mark.slow
def test_tracked_run(checkpoint, tmp_path):
    (command,) = commands("tracking", page("runs"))
    small = {"experts.keep": "6", "calibration.samples": "8", "calibration.length": "32", "calibration.path": str(HELDOUT)}
    run(here(command, {**small, "model.path": str(checkpoint("qwen3_moe")), "run_dir": str(tmp_path / "run")}))
    assert list((tmp_path / "run/tracking/wandb").glob("offline-run-*/*.wandb"))
    assert list((tmp_path / "run/tracking/tensorboard").glob("events*"))


@pytest.mark.slow
def test_benchmark(tmp_path):
    """The case of the methods prints a ratio for each."""
    small = {"calibration.samples": "8", "calibration.length": "32", "calibration.micro_batch": "2"}
    shape = {"shape.hidden": "64", "shape.expert_width": "32", "shape.layers": "2", "shape.experts": "4"}
    output = run(here(commands("benchmark", page("weights"))[0], {**small, **shape, "run_dir": str(tmp_path / "benchmark")}))
    result = json.loads((tmp_path / "benchmark" / "weights.json").read_text())
    assert len(result["methods"]) == 8 and all(abs(row["sparsity"] - 0.5) < 1e-4 for row in result["methods"].values())
    assert "/ read and write" in output and [f.name for f in (tmp_path / "benchmark").iterdir()] == ["weights.json"]
    output = run(here(commands("performance", page("performance"))[0], {**small, **shape, "run_dir": str(tmp_path / "layer")}))
    assert "observe / plain" in output and [f.name for f in (tmp_path / "layer").iterdir()] == ["layer.json"]


@pytest.mark.slow
def test_mixture_weights_and_protection_on_the_command_line(checkpoint, tmp_path):
    (command,) = commands("mixture", page("runs"))
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
def test_text_that_the_model_writes_beside_text_that_is_given(checkpoint, tmp_path):
    write, prune = commands("own-text", page("runs"))[0].splitlines()
    model = {"model.path": str(checkpoint("qwen3_moe"))}
    run(here(write, {**model, "output": str(tmp_path / "own.jsonl"), "texts": "16", "tokens": "20"}))
    (tmp_path / "text.jsonl").write_text(HELDOUT.read_text())
    prune = prune.replace("/data/text.jsonl", str(tmp_path / "text.jsonl")).replace("runs/own.jsonl", str(tmp_path / "own.jsonl"))
    run(here(prune, {**model, "calibration.samples": "8", "calibration.length": "32", "run_dir": str(tmp_path / "run")}))
    assert json.loads((tmp_path / "run" / "stats" / "about.json").read_text())["sources"] == {"given": 4, "own": 4}


@pytest.mark.slow
def test_train_another_model(tmp_path):
    """The command that made the second model of docs/selection.md, for two steps; the result can be pruned."""
    train, _ = commands("train", (ROOT / "docs" / "selection.md").read_text())[0].splitlines()
    words = [*shlex.split(train)[1:], f"output={tmp_path / 'tiny'}", "steps=2", "heldout_samples=50", "calibration_samples=60"]
    words = [word for word in words if word != "output=runs/qwen3_tiny"]
    run([sys.executable, *words])
    model = {"model.path": str(tmp_path / "tiny" / "model"), "calibration.path": str(tmp_path / "tiny" / "calibration.jsonl")}
    small = {"calibration.samples": "8", "calibration.length": "32", "run_dir": str(tmp_path / "run")}
    run(here(commands("own")[0], {**model, **small}))


def test_ci_runs_the_readme_test_command():
    (command,) = commands("tests")
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install") and command.endswith("-m pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_readme_is_short():
    assert len(README.split()) <= 1500


STUDIES = ("study", "prose", "models", "quality")  # hours: tests/unit/benchmark hold their tables, and run small ones


def test_every_command_runs_in_a_test():
    """No block of commands without a mark, and no mark that no test names."""
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        blocks = re.findall(r"(?:<!-- ([\w-]+) -->\n+)?```sh\n", file.read_text())
        assert all(blocks), f"{file.name}: a block of commands without a mark"
        assert all(f'commands("{mark}"' in tests or mark in STUDIES for mark in blocks), f"{file.name}: {blocks}"
