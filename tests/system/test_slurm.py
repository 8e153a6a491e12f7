"""The sbatch files on a real Slurm of three nodes: ranks, requeue, preemption, time limit, cancel, a lost task, sweeps."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.launches import run_job, settings
from helpers.pages import commands, here, page
from helpers.paths import HELDOUT, ROOT
from helpers.slurm_cluster import Cluster, missing
from helpers.tensors import same_tensors
from helpers.zoo import make_checkpoint

pytestmark = pytest.mark.slurm
REASON = missing()
if REASON and os.environ.get("REQUIRE_SLURM"):
    raise RuntimeError(REASON)
if REASON:
    pytest.skip(REASON, allow_module_level=True)
# This Slurm keeps no accounts, which submitit asks for.
SACCT = r"""#!/bin/sh
echo "JobID|State|NodeList"
scontrol -o show job |
    sed -nE 's/^JobId=([0-9]+) (ArrayJobId=([0-9]+) ArrayTaskId=([0-9]+) )?.* JobState=([A-Z]+) .*/\1 \3 \4 \5/p' |
    awk 'NF == 4 { print $2 "_" $3 "|" $4 "|" } NF == 2 { print $1 "|" $2 "|" }'
"""
NEEDS_QUOTES = "my runs/a=1 [b]"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as started:
        yield started


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("slurm") / "source", "mixtral", num_hidden_layers=12)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """... for runs that nothing interrupts."""
    return make_checkpoint(tmp_path_factory.mktemp("slurm") / "shallow", "mixtral", num_hidden_layers=2)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The same run without Slurm."""
    run_dir = tmp_path_factory.mktemp("slurm") / "whole"
    run_job("prune", arguments(source, run_dir), 1)
    return run_dir


@pytest.fixture(scope="module", autouse=True)
def limited(cluster, source, tmp_path_factory):
    """Job and run folder of a run whose rank stands still in the first stream, on a node of its own, until its time is up: Slurm
    looks at it twice a minute. Other tests run meanwhile."""
    run_dir = tmp_path_factory.mktemp("limited") / "run"
    job = submit(cluster, source, run_dir, "--nodelist=node3", "--time=1", "--signal=B:USR1@60")
    until(lambda: "observe 03/12" in log_of(run_dir))
    os.kill(rank_process(run_dir, 0), signal.SIGSTOP)
    return job, run_dir


def arguments(source: Path, run_dir: Path, **overrides) -> list[str]:
    return settings(source, run_dir, **{"calibration__samples": 64, **overrides})


def submit(cluster, source, run_dir: Path, *options: str) -> str:
    words = [str(ROOT / "slurm" / "prune.sbatch"), *arguments(source, run_dir)]
    return start(cluster, run_dir, [*options, *words], RANKS_PER_NODE="1")


def start(cluster, run_dir: Path, words: list[str], cwd: Path = ROOT, **environment: str) -> str:
    """sbatch from a folder, the environment active; the output goes beside the run folder."""
    out, path = f"--output={run_dir.parent / 'job.log'}", f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return cluster.submit(out, "--cpus-per-task=4", *words, cwd=cwd, PATH=path, **environment)


def log_of(run_dir: Path) -> str:
    file = run_dir.parent / "job.log"
    return file.read_text() if file.is_file() else ""


def layers_of(run_dir: Path) -> list[str]:
    """Numbers of the layers that a run's launches have finished, in both streams."""
    return re.findall(r"\] (?:observe|prune) (\d+)/12", log_of(run_dir))


def until(condition, limit: float = 180.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def completed(cluster, job: str, run_dir: Path, limit: float = 120.0) -> None:
    assert cluster.wait(job, ENDED, limit)["JobState"] == "COMPLETED", log_of(run_dir)


def on_these_nodes(command: str, replaced: dict) -> list[str]:
    """The words of an sbatch command of the README, without GPUs and as many CPUs, and with other overrides."""
    sbatch, *words = shlex.split(command)
    assert sbatch == "sbatch"
    options = [word for word in words if word.startswith("--") and "gpus" not in word and "cpus" not in word]
    script, *given = [word for word in words if not word.startswith("--")]
    overrides = dict(word.split("=", 1) for word in given) | replaced
    return [*options, script, *(f"{key}={value}" for key, value in overrides.items())]


def rank_process(run_dir: Path, rank: int) -> int:
    """The process of a rank of the job that works on `run_dir`."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, variables = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            if f"run_dir={run_dir}".encode() in words and f"RANK={rank}".encode() in variables:
                return int(process.name)
    raise AssertionError(f"no rank {rank} of {run_dir}")


def test_the_commands_of_the_readme(cluster, shallow, tmp_path):
    """... on these nodes, which have no GPUs, with this model and text: pruning on two nodes, evaluating on one. The run folder
    has spaces, `=` and brackets, quoted for Hydra."""
    run_dir, rows = tmp_path / NEEDS_QUOTES, tmp_path / "rows.jsonl"
    run_dir.parent.mkdir()
    own = dict(word.split("=", 1) for word in arguments(shallow, f"'{run_dir}'", calibration__samples=10))
    rows.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:4]))
    scored = {
        "model.path": f"'{run_dir}/model'",
        "output": f"'{run_dir}/result.json'",
        "task.path": rows,
        "task.max_new_tokens": 4,
    }
    for command, replaced in zip(commands("slurm")[0].splitlines(), (own, scored), strict=True):
        completed(cluster, start(cluster, run_dir, on_these_nodes(command, replaced)), run_dir)
    assert json.loads((run_dir / "manifest.json").read_text())["summary"]["ranks"] == 2
    assert (run_dir / "code" / "stun" / "pruning" / "job.py").is_file() and any((run_dir / "logs").rglob("*.log"))
    assert json.loads((run_dir / "result.json").read_text())["rows"] == 4


def test_from_another_folder(cluster, shallow, tmp_path):
    """Paths are those of the folder where sbatch is called. Evaluating is submitted by the same lines as generating."""
    folder = tmp_path / NEEDS_QUOTES
    folder.mkdir(parents=True)
    words = [f"model.path={shallow}", f"output='{NEEDS_QUOTES}/own.jsonl'", "texts=2", "tokens=4"]
    completed(cluster, start(cluster, folder, [str(ROOT / "slurm" / "generate.sbatch"), *words], tmp_path), folder)
    assert len((folder / "own.jsonl").read_text().splitlines()) == 2 and (folder / "code" / "slurm" / "job.sh").is_file()
    generating, evaluating = ((ROOT / "slurm" / f"{name}.sbatch").read_text() for name in ("generate", "evaluate"))
    lines = evaluating.partition("# Slurm runs a copy")[2]
    assert lines and generating.partition("# Slurm runs a copy")[2] == lines.replace("evaluate", "generate")


def test_a_copy_of_a_script_says_what_it_lacks(cluster, tmp_path):
    (tmp_path / "prune.sbatch").write_text((ROOT / "slurm" / "prune.sbatch").read_text())
    job = start(cluster, tmp_path / "run", [str(tmp_path / "prune.sbatch"), "run_dir=run"], tmp_path)
    assert cluster.wait(job, ENDED, 60)["JobState"] == "FAILED"
    says = "holds no slurm/job.sh; submit the file slurm/prune.sbatch of the repository itself"
    assert log_of(tmp_path / "run") == f"error: {tmp_path} {says}\n"


def test_goes_on_after_interruptions(cluster, source, whole, tmp_path):
    """A more urgent job takes its node; later, `scontrol requeue`, with most layers still to prune: a layer takes a tenth of a
    second."""
    run_dir = tmp_path / "run"
    job = submit(cluster, source, run_dir, "--nodelist=node1")
    until(lambda: "observe 06/12" in log_of(run_dir))
    words = ["--partition=urgent", "--nodelist=node1", "--exclusive", f"--output={tmp_path / 'urgent.log'}"]
    urgent = cluster.submit(*words, "--wrap=sleep 1", cwd=ROOT)
    assert cluster.wait(urgent, ENDED)["JobState"] == "COMPLETED"
    before = len(layers_of(run_dir))
    until(lambda: len(layers_of(run_dir)) > before)
    assert cluster.job(job)["Restarts"] == "1"
    cluster.client("scontrol", "requeue", job)
    until(lambda: cluster.job(job).get("Restarts") == "2")
    completed(cluster, job, run_dir)
    same_tensors(whole / "model", run_dir / "model")
    assert len(layers_of(run_dir)) <= 24 + 2, "at most one finished layer was done again after each"


def test_cancel(cluster, source, tmp_path):
    """... of a job that was submitted in another folder."""
    run_dir = tmp_path / NEEDS_QUOTES
    run_dir.parent.mkdir()
    words = ["--nodes=1", str(ROOT / "slurm" / "prune.sbatch"), *arguments(source, f"'{NEEDS_QUOTES}'")]
    job = start(cluster, run_dir, words, tmp_path)
    until(lambda: "observe 02/12" in log_of(run_dir))
    cluster.client("scancel", job)
    assert cluster.wait(job, ENDED, 30)["JobState"] == "CANCELLED"
    assert (run_dir / "code" / "slurm" / "job.sh").is_file() and not (run_dir / "manifest.json").exists()


def test_a_lost_task_ends_the_job(cluster, source, whole, tmp_path):
    """... at once; the same command goes on."""
    run_dir = tmp_path / "run"
    job = submit(cluster, source, run_dir, "--nodes=2")
    until(lambda: "prune 03/12" in log_of(run_dir))
    os.kill(rank_process(run_dir, 1), signal.SIGKILL)
    assert cluster.wait(job, ENDED, 30)["JobState"] == "FAILED"
    said = log_of(run_dir)
    assert len(re.findall(r"interrupted after layer \d+ of 12 \(prune\); the same command continues\n", said)) == 1, said
    assert "Signal 9 (SIGKILL)" in said and "error: rank" not in said, said
    completed(cluster, submit(cluster, source, run_dir, "--nodes=1"), run_dir)
    same_tensors(whole / "model", run_dir / "model")


def test_a_failure_is_one(cluster, tmp_path):
    job = submit(cluster, tmp_path / "nowhere", tmp_path / "run", "--nodes=2")
    assert cluster.wait(job, ENDED, 60)["JobState"] == "FAILED"
    assert "not a folder, nor the name of a model" in log_of(tmp_path / "run")


def test_array_sweep(cluster, shallow, tmp_path):
    """The README's command with a task: the statistics and the dense model's result, an array of runs, a report."""
    root, rows = tmp_path / "a sweep=1 %a", tmp_path / "rows.jsonl"
    rows.write_text("".join(HELDOUT.read_text().splitlines(keepends=True)[:2]))
    small = {"calibration__samples": 10, "task__path": rows, "task__max_new_tokens": 2}
    own = dict(word.split("=", 1) for word in arguments(shallow, f"'{root}'", experts__fraction="0.1,0.3", **small))
    job = start(cluster, root, on_these_nodes(commands("sweep", page("runs"))[0], own))
    completed(cluster, job, root)
    report, fractions = root / "report.txt", ["0.1", "0.3"]
    until(lambda: report.is_file() and "experts kept" in report.read_text())
    check_sweep(root, fractions)
    results = [json.loads((root / f"experts.fraction-{fraction}" / "result.json").read_text()) for fraction in fractions]
    for fraction, result in zip(fractions, results, strict=True):
        assert re.search(rf"^experts.fraction-{fraction} .* {result['perplexity']:.3f}$", report.read_text(), re.M)
    assert all("agreement" in result for result in results) and (root / "dense.json").is_file()
    assert here(commands("report", page("runs"))[0], {"folder": str(root)})[1:4] == ["-m", "stun", "report"]


def check_sweep(root: Path, fractions: list[str]) -> None:
    """One stream of statistics, and every run from it."""
    for fraction in fractions:
        run = root / f"experts.fraction-{fraction}"
        assert (run / "manifest.json").is_file() and not (run / "stats").exists()
    assert (root / "statistics" / "stats" / "about.json").is_file()


def test_submitit_multirun(cluster, shallow, tmp_path):
    """The README's command on these nodes, two tasks a run."""
    root, tools = tmp_path / "sweep", tmp_path / "bin"
    tools.mkdir()
    (tools / "sacct").write_text(SACCT)
    (tools / "sacct").chmod(0o755)
    words = shlex.split(commands("submitit", page("runs"))[0])
    given = dict(word.split("=", 1) for word in words[3:])
    own = dict(word.split("=", 1) for word in arguments(shallow, root, experts__fraction="0.2,0.5", calibration__samples=10))
    own |= {"hydra.launcher.gpus_per_node": "null", "hydra.launcher.tasks_per_node": "2", "hydra.launcher.cpus_per_task": "1"}
    command = [sys.executable, "-m", "stun", "prune", "-m", *(f"{key}={value}" for key, value in (given | own).items())]
    environment = {**cluster.environment, "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert words[:4] == ["stun", "prune", "-m", "launcher=slurm"] and done.returncode == 0, done.stderr
    check_sweep(root, ["0.2", "0.5"])
    for fraction in ("0.2", "0.5"):
        assert json.loads((root / f"experts.fraction-{fraction}" / "manifest.json").read_text())["summary"]["ranks"] == 2


def test_goes_on_after_its_time_limit(cluster, limited, whole):
    job, run_dir = limited
    completed(cluster, job, run_dir, 200)
    assert int(cluster.job(job)["Restarts"]) >= 1
    assert len(layers_of(run_dir)) <= 24 + int(cluster.job(job)["Restarts"])
    same_tensors(whole / "model", run_dir / "model")
