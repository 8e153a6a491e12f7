"""Every command of the pages in docs/ runs on the reference model, or is one that the README's tests run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from helpers.configs import composed
from helpers.pages import README, commands, here, job_and_overrides, page, run
from helpers.paths import HELDOUT, REFERENCE, ROOT
from stun.__main__ import DEMO

MODEL = {"model.path": str(REFERENCE / "model")}
TEXT = {"calibration.path": str(REFERENCE / "calibration.jsonl"), "calibration.samples": "16", "calibration.length": "64"}


def rows_of(tmp_path: Path) -> dict[str, str]:
    """A task of a few of the reference's questions whose answers are numbers, and what makes it quick."""
    rows = [row for row in HELDOUT.read_text().splitlines() if json.loads(row)["answer"].split()[-1].isdecimal()]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:12]) + "\n")
    return {"task.path": str(tmp_path / "rows.jsonl"), "task.max_new_tokens": "8"}


@pytest.mark.slow
def test_qwen3_on_one_gpu(tmp_path):
    """From preflight to the model card; GSM8K's form without its worked examples, which are longer than the model's context."""
    preflight, prune, both, report = commands("qwen3", page("qwen3-on-one-gpu"))
    dense, pruned = both.splitlines()
    run_dir = tmp_path / "run"
    own = {**MODEL, **TEXT, "run_dir": str(run_dir), "experts.keep": "24"}
    task = {**rows_of(tmp_path), "task.prompt": "'{question}'"}
    assert "disk" in run(here(preflight, own))
    assert "experts kept" in run(here(prune, own))
    run(here(dense, {**MODEL, **task, "output": str(tmp_path / "dense.json")}))
    evaluated = {
        "model.path": str(run_dir / "model"),
        "dense": str(tmp_path / "dense.json"),
        "output": str(run_dir / "result.json"),
    }
    run(here(pruned, {**task, **evaluated}))
    assert str(run_dir / "report" / "index.html") in run(here(report, {"folder": str(run_dir)}))
    assert "perplexity" in (run_dir / "model" / "README.md").read_text()


@pytest.mark.slow
def test_serve_check(checkpoint, tmp_path):
    """The page's command, with the runtime that is here, on a family that it has."""
    own = {"model.path": str(checkpoint("mixtral")), "runtime": "transformers", "python": sys.executable, "tokens": "4"}
    own["output"] = str(tmp_path / "served.json")
    assert "12 of 12" in run(here(commands("served", page("serving"))[0], own))


@pytest.mark.ranks
@pytest.mark.slow
def test_paper_comparison(checkpoint, tmp_path):
    """On the reference model it is the demo of the README, which its test runs; here it has another task."""
    reference, large = commands("paper", page("paper-comparison"))
    paper, demo = (composed("compare", words) for words in (job_and_overrides(reference)[1], DEMO))
    assert {key for key in paper if paper[key] != demo[key]} == {"run_dir", "precision", "task"}
    assert {**paper["task"], "batch": demo["task"]["batch"]} == demo["task"]
    own = {**TEXT, **rows_of(tmp_path), "task.prompt": "'{question}'", "run_dir": str(tmp_path / "b")}
    own["model.path"] = str(checkpoint("arctic"))
    output = run(here(large, own))
    assert "exact match, average" in output and output.splitlines()[-1] == str(tmp_path / "b" / "report" / "index.html")
    (report,) = commands("read", page("read-a-report"))
    assert "stun/report/index.html" in run(here(report, {"folder": str(tmp_path / "b" / "stun")}))


def test_arctic_on_slurm():
    """Its commands are the README's, which tests run on a real Slurm; evaluation is given other models as well."""
    preflight, jobs, report = commands("arctic", page("arctic-on-slurm"))
    prune, dense, pruned = jobs.splitlines()
    assert preflight == commands("preflight", page("runs"))[0] and report.startswith("stun report folder=")
    known_prune, known_evaluate = commands("slurm")[0].splitlines()
    assert prune == known_prune
    for command in (dense, pruned):
        assert {word.split("=")[0] for word in command.split()} - {word.split("=")[0] for word in known_evaluate.split()} <= {
            "dense"
        }


@pytest.mark.slow
def test_add_a_family():
    """The command picks that family's test, which the suite runs."""
    words = commands("family", page("add-a-family"))[0].split()
    assert "test_family[olmoe]" in run([*words, "--collect-only", "-n0"])


def test_pages_are_linked():
    """Every page is in the README, and no link leads nowhere."""
    for file in (ROOT / "docs").glob("*.md"):
        assert f"docs/{file.name}" in README
        for target in re.findall(r"\]\(([^)#:]+)[)#]", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name}: {target}"
    for target in re.findall(r"\]\(([^)#:]+)[)#]", README):
        assert (ROOT / target).exists(), target
