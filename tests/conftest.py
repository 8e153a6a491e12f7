"""Small checkpoints on disk and launches of the real jobs."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from selections import TEXT, config
from warm import WarmProcess
from zoo import make_checkpoint

from stun.pruning.job import take_statistics
from stun.run.recorder import Recorder
from stun.runtime.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config) -> None:
    """Tests that run side by side get cores of their own: threads of two jobs on one core wait for one another."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        number, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = sorted(os.sched_getaffinity(0))
        own = cores[number::count] or cores
        os.sched_setaffinity(0, own)
        torch.set_num_threads(len(own))


@pytest.fixture(scope="module")
def ranks():
    """This process as the only rank."""
    with Ranks() as started:
        yield started


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(family, **how)`: the folder of such a checkpoint, made once a test run."""
    made: dict[str, Path] = {}

    def get(family: str, **how) -> Path:
        key = f"{family} {sorted((k, str(v)) for k, v in how.items())}"
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family) / "model", family, **how)
        return made[key]

    return get


class _Stop(Exception):
    """Ends a run at a given place."""


@contextmanager
def stopped_after(stream: str, layer: int):
    """What runs inside ends once that layer of that stream is on disk."""
    queue = Recorder.layer

    def stop(self, index, *arguments, **keywords):
        queue(self, index, *arguments, **keywords)
        if (self.ledger.stream, index) == (stream, layer):
            self.close()
            raise _Stop

    with pytest.MonkeyPatch.context() as patched, pytest.raises(_Stop):
        patched.setattr(Recorder, "layer", stop)
        yield


@pytest.fixture(scope="module")
def observed(tmp_path_factory, ranks):
    """(checkpoint, run folder with its statistics)."""
    folder = tmp_path_factory.mktemp("observed")
    source = make_checkpoint(folder / "source", "mixtral", num_local_experts=12)
    take_statistics(config(source, folder / "run"), ranks)
    return source, folder / "run"


def settings(model: Path, run_dir: Path, **overrides) -> list[str]:
    """Command-line overrides for a small run; dots in keys are written as two underscores."""
    base = {
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


def _succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    if done.returncode:
        raise AssertionError(f"{' '.join(done.args)}\n{done.stdout}\n{done.stderr}")
    return done


@cache
def _warm() -> WarmProcess:
    process = WarmProcess(environment())
    atexit.register(process.end)
    return process


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(files):
        own = load_file(folder / file)
        assert not tensors.keys() & own.keys(), "a tensor stands in one file only"
        tensors |= own
    return tensors


def same_tensors(one: Path, two: Path) -> None:
    """Assert that two checkpoints hold the same names and bytes."""
    first, second = load_tensors(one), load_tensors(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(
            tensor.contiguous().view(torch.uint8), second[name].contiguous().view(torch.uint8)
        ), name
