"""How a job ends before its time: by a signal, in one line that says where it continues."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.launches import environment, run_job, settings, torchrun
from helpers.paths import ROOT
from helpers.zoo import make_checkpoint

pytestmark = pytest.mark.slow
LAYERS = 12
LONG = {"calibration__samples": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ends") / "source", "mixtral", num_hidden_layers=LAYERS)


def started(command: list[str], until: str) -> subprocess.Popen:
    """The command, once it has printed `until`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes)
    assert any(until in line for line in job.stdout), job.communicate()[1]
    return job


def rank_process(job: subprocess.Popen, rank: int) -> int:
    """The process of a rank below the launcher `job`."""
    for child in subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no rank {rank}")


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def continues(source: Path, run_dir: Path, said: str) -> None:
    """The line in `said` names the layer after which the same command goes on."""
    lines = [line for line in said.splitlines() if line.startswith("interrupted")]
    (after,) = re.findall(rf"^interrupted after layer (\d+) of {LAYERS} \(observe\); the same command continues$", lines[0])
    assert len(lines) == 1 and "KeyboardInterrupt" not in said and "error: " not in said
    done = run_job("prune", settings(source, run_dir, **LONG), 1)
    (at,) = re.findall(rf"\] continuing at layer (\d+) of {LAYERS} \(observe\)$", done.stdout, re.M)
    assert abs(int(at) - int(after) - 1) <= 1  # a rank may have ended while it wrote its part of a layer


def test_sigterm(source, tmp_path):
    job = started([sys.executable, "-m", "jobs.prune", *settings(source, tmp_path / "run", **LONG)], "observe 03/")
    job.terminate()
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 128 + signal.SIGTERM and said.count("\n") == 1, said
    continues(source, tmp_path / "run", said)


@pytest.mark.ranks
def test_ctrl_c_under_torchrun_in_a_collective(source, tmp_path):
    """The first rank waits for the other one, which stands still: it ends all the same, and the line comes once."""
    command = torchrun(2, ["-m", "jobs.prune", *settings(source, tmp_path / "run", **LONG)])
    job = started(command, "observe 03/")
    first, other = (rank_process(job, rank) for rank in range(2))
    os.kill(other, signal.SIGSTOP)
    try:
        time.sleep(1)
        job.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 20  # torchrun kills after 30
        while is_alive(first):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(other, signal.SIGCONT)
    said = job.communicate(timeout=60)[1]
    assert job.returncode and said.count("Traceback") == 1, said  # torchrun's own
    continues(source, tmp_path / "run", said)
