"""Launches of the real jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import pytest

from helpers.paths import ROOT, TEXT
from helpers.pretend.device import missing
from helpers.warm import WarmProcess


def settings(model: Path, run_dir: Path, **overrides) -> list[str]:
    """Command-line overrides for a small run, by the paper's methods where no others are given; dots in keys are written as two
    underscores."""
    base = {
        "experts": "stun",
        "sparsify": "wanda",
        "model.path": model,
        "calibration.path": TEXT,
        "calibration.samples": 10,
        "calibration.length": 48,
        "calibration.micro_batch": 2,
        "target": 0.4,
        "run_dir": run_dir,
    }
    return [f"{key}={value}" for key, value in {**base, **{k.replace("__", "."): v for k, v in overrides.items()}}.items()]


def torchrun(ranks: int, script: list[str]) -> list[str]:
    """The command that starts `script` on that many ranks, at a free port."""
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *rendezvous, *script]


def environment() -> dict[str, str]:
    """For a job: without what ranks started in this very process have put there; a launcher says it anew, or nobody does."""
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {key: value for key, value in os.environ.items() if key not in own}
    return {**inherited, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def launch(command: list[str]) -> subprocess.CompletedProcess:
    """Run a command as it stands."""
    return _succeeded(subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900))


def launch_job(job: str, arguments: list[str], ranks: int = 0) -> subprocess.CompletedProcess:
    """Run `jobs.<job>` as a user does: plain python for 0 ranks, torchrun otherwise."""
    script = ["-m", f"jobs.{job}", *arguments]
    return launch(torchrun(ranks, script) if ranks else [sys.executable, *script])


def run_job(job: str, arguments: list[str], ranks: int = 0, check: bool = True) -> subprocess.CompletedProcess:
    """The same with ranks that need not import the package first (see warm.py)."""
    return run_warm(["-m", f"jobs.{job}", *arguments], ranks, check)


def run_warm(script: list[str], ranks: int, check: bool = True) -> subprocess.CompletedProcess:
    """`-m MODULE ...` or `FILE ...` on such ranks."""
    with TemporaryDirectory() as folder:
        done = _warm().run(list(map(str, script)), ranks, environment(), Path(folder))
    return _succeeded(done) if check else done


def run_pretend(script: list[str], ranks: int = 0, gpus: int = 1, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """The same on as many pretend GPUs (helpers/pretend)."""
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    with TemporaryDirectory() as folder:
        done = _warm_pretend().run(list(map(str, script)), ranks, {**_pretending(), **visible, **env}, Path(folder))
    return _succeeded(done) if check else done


def _pretending() -> dict[str, str]:
    """As on a machine with a GPU: this process has none, and has told DeepSpeed so."""
    own = {key: value for key, value in environment().items() if key != "DS_ACCELERATOR"}
    return {**own, "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1"}


def _succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    if done.returncode:
        raise AssertionError(f"{' '.join(done.args)}\n{done.stdout}\n{done.stderr}")
    return done


@cache
def _warm_pretend() -> WarmProcess:
    if reason := missing():
        pytest.skip(reason)
    return WarmProcess(_pretending(), *_shared("pretend"), "pretend")


@cache
def _warm() -> WarmProcess:
    return WarmProcess(environment(), *_shared("warm"))


def _shared(name: str) -> tuple[Path, int]:
    """Address, and owner, of a process that serves all workers of this test run."""
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    folder = Path(gettempdir(), f"stun-tests-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{name}-{os.environ.get('PYTEST_XDIST_TESTRUNUID', '')[:16]}-{owner}", owner
