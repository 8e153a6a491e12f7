"""The sbatch file on a real Slurm of two virtual nodes: nodes, requeue, time limit, cancel, a lost task."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_job, same_tensors, settings
from slurm_cluster import Cluster, missing
from test_readme import commands
from zoo import make_checkpoint

pytestmark = pytest.mark.launch
REASON = missing()
if REASON and os.environ.get("REQUIRE_SLURM"):
    raise RuntimeError(REASON)
if REASON:
    pytest.skip(REASON, allow_module_level=True)
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as started:
        yield started


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("slurm") / "source", "mixtral", num_hidden_layers=12)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The same run without Slurm."""
    run_dir = tmp_path_factory.mktemp("slurm") / "whole"
    run_job("prune", arguments(source, run_dir), 1)
    return run_dir


def arguments(source: Path, run_dir: Path) -> list[str]:
    return settings(source, run_dir, calibration__samples=64)


def submit(cluster, source, run_dir: Path, *options: str, ranks: int = 1) -> str:
    out = f"--output={run_dir.parent / 'job.log'}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = [str(ROOT / "slurm" / "prune.sbatch"), *arguments(source, run_dir)]
    return cluster.submit(out, "--cpus-per-task=4", *options, *script, cwd=ROOT, PATH=path, RANKS_PER_NODE=str(ranks))


def log_of(run_dir: Path) -> str:
    file = run_dir.parent / "job.log"
    return file.read_text() if file.is_file() else ""


def until(condition, limit: float = 90.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("nodes", [1, 2])
def test_runs_on_nodes(cluster, source, whole, tmp_path, nodes):
    run_dir = tmp_path / "run"
    job = submit(cluster, source, run_dir, f"--nodes={nodes}", ranks=3 - nodes)
    assert cluster.wait(job, ENDED)["JobState"] == "COMPLETED", log_of(run_dir)
    assert json.loads((run_dir / "manifest.json").read_text())["summary"]["ranks"] == 2
    assert (run_dir / "code" / "stun" / "prune.py").is_file() and any((run_dir / "logs").rglob("*.log"))
    same_tensors(whole / "model", run_dir / "model")


@pytest.mark.parametrize("how", ["requeue", "signal"])
def test_goes_on_after_an_interruption(cluster, source, whole, tmp_path, how):
    """`scontrol requeue` in the middle, and the signal that comes before the time limit."""
    run_dir = tmp_path / "run"
    job = submit(cluster, source, run_dir, "--nodes=1")
    until(lambda: "prune 03/12" in log_of(run_dir))
    if how == "requeue":
        cluster.client("scontrol", "requeue", job)
    else:
        cluster.client("scancel", "--batch", "--signal=USR1", job)
    until(lambda: cluster.job(job).get("Restarts") == "1")
    assert cluster.wait(job, ENDED)["JobState"] == "COMPLETED", log_of(run_dir)
    same_tensors(whole / "model", run_dir / "model")
    done = re.findall(r"\] prune (\d+)/12", log_of(run_dir))
    assert len(done) <= 13, "at most one finished layer was done again"


def test_cancel(cluster, source, tmp_path):
    run_dir = tmp_path / "run"
    job = submit(cluster, source, run_dir, "--nodes=1")
    until(lambda: "observe 02/12" in log_of(run_dir))
    cluster.client("scancel", job)
    assert cluster.wait(job, ENDED, 30)["JobState"] == "CANCELLED"
    assert not (run_dir / "manifest.json").exists()


def test_the_command_of_the_readme(cluster, source, tmp_path):
    """... on these nodes, which have no GPUs, with this model and text."""
    sbatch, *words = shlex.split(commands("slurm")[0])
    options = [word for word in words if word.startswith("--") and "gpus" not in word]
    script, *given = [word for word in words if not word.startswith("--")]
    own = dict(word.split("=", 1) for word in [*given, *arguments(source, tmp_path / "run")])
    out, path = f"--output={tmp_path / 'job.log'}", f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    overrides = [f"{key}={value}" for key, value in own.items()]
    job = cluster.submit(out, "--cpus-per-task=4", *options, script, *overrides, cwd=ROOT, PATH=path)
    assert sbatch == "sbatch" and cluster.wait(job, ENDED)["JobState"] == "COMPLETED", log_of(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["summary"]["ranks"] == 2


def test_a_failure_is_one(cluster, tmp_path):
    job = submit(cluster, tmp_path / "nowhere", tmp_path / "run", "--nodes=2")
    assert cluster.wait(job, ENDED, 60)["JobState"] == "FAILED"
    assert "not a folder; download the checkpoint first" in log_of(tmp_path / "run")
