"""What trackers are told is what the run did, over all launches of it; what goes wrong in them costs nothing else."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading

import pytest

from helpers.kill_runs import request
from helpers.launches import run_job, settings
from helpers.paths import TEXT
from helpers.stops import stopped_after
from helpers.wandb_files import launches
from stun.config import ModelConfig, StunError, TrackingConfig, Wandb
from stun.evaluation.config import EvaluateConfig, TaskConfig
from stun.pruning.job import prune
from stun.report.config import ReportConfig
from stun.tracking.tracker import Background, check_tracking, track_report, tracked

LAYERS = 3
OFFLINE, WANDB = TrackingConfig(wandb=Wandb.offline, tensorboard=True), TrackingConfig(wandb=Wandb.offline)
SECRETS = {"WANDB_API_KEY": "SecretSecret" * 4, "HF_TOKEN": "hf_SecretToken"}


def tracked_request(checkpoint, folder, tracking=OFFLINE):
    from dataclasses import replace

    return replace(request(str(checkpoint("arctic")), folder), tracking=tracking)


@pytest.fixture(scope="module")
def resumed(checkpoint, ranks, tmp_path_factory):
    """(run folder, summary, log) of a run that was interrupted once a layer of its second stream was on disk, and went on."""
    from contextlib import redirect_stdout
    from io import StringIO

    folder, log = tmp_path_factory.mktemp("tracked") / "run", StringIO()
    cfg = tracked_request(checkpoint, folder)

    with pytest.MonkeyPatch.context() as patched, redirect_stdout(log):
        for name, value in SECRETS.items():
            patched.setenv(name, value)
        with stopped_after("prune", 1):
            prune(cfg, ranks)
        summary = prune(cfg, ranks)
    return folder, summary, log.getvalue()


@pytest.mark.slow
def test_wandb_offline_continues_one_run(resumed, checkpoint):
    folder, summary, log = resumed
    first, second = launches(folder)
    assert first.run_id == second.run_id == json.loads((folder / "tracking" / "wandb.json").read_text())["id"]
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert {**first.history, **second.history}.keys() == set(range(2 * LAYERS))
    assert first.history.keys() == {0, 1, 2, 3, 4} and second.history.keys() == {5}  # what is on disk is not done again
    for launch in (first, second):
        assert launch.config["model"] == {"path": str(checkpoint("arctic"))} and launch.config["sparsify"]["ratios"] == "owl"
        assert launch.config["experts"]["budget"] == "global" and launch.config["tracking"]["wandb"] == "offline"
    lines = re.findall(r"prune (\d+)/3 \| experts \d+->(\d+) \| nonzero ([\d.]+) \|", log)
    tracked = {**first.history, **second.history}
    for number, kept, share in lines:
        metrics = tracked[LAYERS + int(number) - 1]
        assert metrics["prune/experts_kept"] == int(kept) == summary["kept"][int(number) - 1]
        assert f"{metrics['prune/nonzero_share']:.3f}" == share
    for step, metrics in tracked.items():
        stream = "observe" if step < LAYERS else "prune"
        assert metrics[f"{stream}/peak_gib"] > 0
        assert {f"{stream}/{kind}_seconds" for kind in ("read", "compute", "write")} <= metrics.keys()
    assert second.summary["nonzero"] == summary["nonzero"] and second.summary["kept"] == summary["kept"]


@pytest.mark.slow
def test_tensorboard_holds_the_same(resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, summary, _ = resumed
    events = EventAccumulator(str(folder / "tracking" / "tensorboard")).Reload()
    told = {launch_step: row for launch in launches(folder) for launch_step, row in launch.history.items()}
    assert [e.step for e in events.Scalars("observe/compute_seconds")] == list(range(LAYERS))
    shares = {e.step: e.value for e in events.Scalars("prune/nonzero_share")}
    assert shares == {step: pytest.approx(row["prune/nonzero_share"]) for step, row in told.items() if step >= LAYERS and row}
    assert [e.value for e in events.Scalars("summary/nonzero")][-1] == summary["nonzero"]


@pytest.mark.slow
def test_nothing_secret_or_of_the_host_is_kept(resumed):
    folder, _, log = resumed
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    for file in files:
        content = file.read_bytes()
        assert b"Secret" not in content, file
        if file.suffix == ".wandb":
            assert b"| nonzero" not in content and b"python" not in content.lower(), "console, metadata"
            assert len(socket.gethostname()) < 6 or socket.gethostname().encode() not in content
    assert "Secret" not in log and len(re.findall("W&B|wandb", log)) <= 4  # a line a launch
    assert not {".git", "requirements.txt", "wandb-metadata.json", "output.log"} & {file.name for file in files}


@pytest.mark.slow
def test_evaluation_and_report_join_the_run(resumed, checkpoint, ranks, tmp_path, capsys):
    """After the run, by the jobs themselves."""
    import jobs.evaluate
    import jobs.report

    folder, _, _ = resumed
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(TEXT.with_name("heldout.jsonl").read_text().splitlines(keepends=True)[:4]))
    task = TaskConfig(path=str(rows), max_new_tokens=2)
    output = str(folder / "result.json")
    jobs.evaluate.work(EvaluateConfig(ModelConfig(str(folder / "model")), task, output=output, tracking=OFFLINE), ranks)
    jobs.report.work(ReportConfig(str(folder)), ranks)
    evaluated, reported = launches(folder)[2:]
    assert evaluated.run_id == reported.run_id == launches(folder)[0].run_id
    result = json.loads((folder / "result.json").read_text())
    assert evaluated.summary["evaluate"]["perplexity"] == pytest.approx(result["perplexity"])
    assert evaluated.config["evaluate"]["task"]["max_new_tokens"] == 2
    pictures = sorted(file.stem for file in (folder / "report").glob("*.png"))
    assert "sparsity-light" in pictures
    assert sorted(reported.artifacts) == sorted(["index.html", *(f"{name}.png" for name in pictures)])
    assert any("figures/sparsity-light/path" in row for row in reported.history.values())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tracking" / "tensorboard")).Reload()
    assert sorted(events.Tags()["images"]) == [f"figures/{name}" for name in pictures]
    assert "warning" not in capsys.readouterr().out


@pytest.mark.slow
def test_another_tracking_continues_the_run(checkpoint, ranks, tmp_path):
    prune(tracked_request(checkpoint, tmp_path / "run", TrackingConfig()), ranks)
    assert not (tmp_path / "run" / "tracking").exists()
    assert prune(tracked_request(checkpoint, tmp_path / "run", TrackingConfig(tensorboard=True)), ranks)["nonzero"]


def test_a_tracker_that_hangs_or_fails_costs_nothing():
    said, release = [], threading.Event()
    hanging = Background("slow", lambda: release.wait(), said.append)
    hanging.call(lambda it: it.log({}, 0))
    hanging.end(0.05)
    release.set()
    failing = Background("broken", lambda: 1 / 0, said.append)
    for step in range(3):
        failing.call(lambda it, step=step: it.log({}, step))
    failing.end(10)
    assert "warning: slow did not finish" in said[0] and any("warning: broken failed" in line for line in said[1:])


def test_what_cannot_be_tracked_is_refused(checkpoint, ranks, tmp_path, monkeypatch):
    for bad in ("", "a/b", "x" * 129):
        with pytest.raises(StunError, match=r"tracking\.project"):
            prune(tracked_request(checkpoint, tmp_path / "run", TrackingConfig(project=bad)), ranks)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(StunError, match=r"tracking\.tensorboard: .*pip install"):
        prune(tracked_request(checkpoint, tmp_path / "run", OFFLINE), ranks)
    assert not (tmp_path / "run").exists()
    check_tracking(TrackingConfig(wandb=Wandb.offline))
    (tmp_path / "tracking").write_text("a file in its place")
    with (
        pytest.raises(StunError, match=r"tracking: cannot be written: .*tracking\.wandb=disabled"),
        tracked(WANDB, tmp_path, {}, ranks),
    ):
        pass
    (tmp_path / "other" / "tracking").mkdir(parents=True)
    (tmp_path / "other" / "tracking" / "wandb.json").write_text('{"id": "abc", "mode": "magic"}')
    with pytest.raises(StunError, match=r"wandb\.json: mode must be one of disabled, offline, online"):
        track_report(tmp_path / "other", ranks)


@pytest.mark.slow
def test_online_needs_a_key_and_no_server(checkpoint, tmp_path, monkeypatch):
    """Without a key nothing starts; with a server that nobody answers for the run goes on, offline."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_SERVICE"):  # the latter is W&B's process that serves this one
        monkeypatch.delenv(name, raising=False)
    small = {"calibration__samples": 4, "calibration__length": 16, "tracking": "wandb"}
    refused = run_job("prune", settings(checkpoint("mixtral"), tmp_path / "run", **small), check=False)
    assert refused.returncode == 2 and refused.stderr.count("error: tracking.wandb=online: no API key") == 1
    assert not (tmp_path / "run").exists()
    unreachable = {"WANDB_API_KEY": SECRETS["WANDB_API_KEY"], "WANDB_BASE_URL": "http://localhost:9", "WANDB_INIT_TIMEOUT": "2"}
    for name, value in unreachable.items():
        monkeypatch.setenv(name, value)
    done = run_job("prune", settings(checkpoint("mixtral"), tmp_path / "run", **small))
    assert len(re.findall("warning: .*W&B cannot be reached", done.stdout)) == 1, done.stdout
    assert not re.search("wandb:", done.stdout + done.stderr), done.stderr
    (launch,) = launches(tmp_path / "run")
    assert launch.history.keys() == set(range(2 * LAYERS)) and launch.exit_code == 0
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_file() and b"SecretSecret" in file.read_bytes()]


@pytest.mark.slow
def test_nothing_is_imported_that_is_not_used(checkpoint, tmp_path):
    """Neither trackers that are off, nor what draws, nor what talks to other ranks."""
    import subprocess

    from helpers.launches import environment
    from helpers.paths import ROOT

    small = settings(checkpoint("mixtral"), tmp_path / "run", calibration__samples=2, calibration__length=16)
    command = [sys.executable, "-X", "importtime", "-m", "jobs.prune", *small]
    done = subprocess.run(command, cwd=ROOT, env={**environment(), "NO_COLOR": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "import time:" in done.stderr
    found = set(
        re.findall(r"\|\s+((?:wandb|tensorboard|torch\.utils\.tensorboard|matplotlib|deepspeed)\b.*)$", done.stderr, re.M)
    )
    assert not found
    assert os.path.exists(tmp_path / "run" / "manifest.json")
