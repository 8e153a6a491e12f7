"""What goes wrong in the middle ends the whole job soon, in a line that says where, and leaves what is finished."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import save_file

from helpers.kill_runs import request
from helpers.launches import run_job, run_warm, settings, torchrun
from helpers.paths import ROOT
from helpers.tensors import load_tensors, same_tensors
from helpers.zoo import make_checkpoint
from stun.config import StunError
from stun.pruning.job import prune
from stun.run.recorder import Recorder


def half_files(folder) -> list[str]:
    return [file.name for file in folder.rglob("*") if file.name.endswith(".tmp") or ".tmp" in file.name]


@pytest.mark.ranks
@pytest.mark.slow
def test_disk_full(tmp_path):
    """Files may not grow beyond 60 KiB: the first shard of a layer does not fit, and the job says so."""
    source, script = make_checkpoint(tmp_path / "source", "mixtral"), tmp_path / "limited.py"
    script.write_text(
        "import resource, runpy\nresource.setrlimit(resource.RLIMIT_FSIZE, (60 << 10, 60 << 10))\n"
        "runpy.run_module('jobs.prune', run_name='__main__')\n"
    )
    arguments = settings(source, tmp_path / "run", calibration__samples=2)
    done = run_warm([script, *arguments], 2, check=False)
    assert done.returncode, done.stdout
    assert re.search(r"error: (rank \d, prune layer \d: )?.*safetensors: cannot be written: .*[Ff]ile too large", done.stderr), (
        done.stderr
    )
    assert not half_files(tmp_path / "run") and not (tmp_path / "run" / "manifest.json").exists()
    run_job("prune", arguments, 1)
    run_job("prune", settings(source, tmp_path / "whole", calibration__samples=2), 1)
    same_tensors(tmp_path / "whole" / "model", tmp_path / "run" / "model")


@pytest.mark.slow
def test_out_of_memory(tmp_path):
    """Attention scores beyond an address space of 6 GiB, of which preflight does not know."""
    source = make_checkpoint(tmp_path / "source", "gpt_oss")
    long = {"calibration__samples": 7, "calibration__length": 5000, "calibration__micro_batch": 7}
    command = shlex.join([sys.executable, "-m", "jobs.prune", *settings(source, tmp_path / "run", **long)])
    script = f"ulimit -v {6 << 20}; exec {command}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"error: rank 0, observe layer 0: out of memory \(more ranks, .*micro_batch", done.stderr), done.stderr
    assert not half_files(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"target": 2}, {"calibration__path": "nobody/nothing"}])
def test_tokens_stay_out_of_run_folders_and_logs(checkpoint, tmp_path, monkeypatch, change):
    secrets = {
        "HF_TOKEN": "hf_SecretSecretSecret",
        "WANDB_API_KEY": "SecretSecretSecret" * 2,
        "HUGGING_FACE_HUB_TOKEN": "hf_SecretTwo",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    done = run_job("prune", settings(checkpoint("mixtral"), tmp_path / "run", **change), check=not change)
    written = [file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert bool(written) == (not change)
    assert not any(b"Secret" in content for content in [*written, done.stdout.encode(), done.stderr.encode()])


@pytest.mark.ranks
def test_one_rank_fails_alone(tmp_path):
    """Weights of an expert of the second rank that no token reaches hold a NaN: only that rank can notice."""
    source = make_checkpoint(tmp_path / "source", "mixtral", num_local_experts=32, shard="1GB", tie_word_embeddings=False)
    tensors = load_tensors(source)
    for layer in range(3):
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"][20] *= 1e-6
    tensors["model.layers.1.block_sparse_moe.experts.20.w2.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    began = time.monotonic()
    how = {"calibration__samples": 2, "calibration__length": 8, "experts__fraction": 0}
    done = run_job("prune", settings(source, tmp_path / "run", **how), 2, check=False)
    assert done.returncode and time.monotonic() - began < 60
    says = r"error: rank 1, prune layer 1: layer 1 expert 20 down_proj: Wanda score: not finite"
    assert re.search(says, done.stderr) and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.ranks
@pytest.mark.slow
def test_one_rank_is_killed(tmp_path):
    """The others end within seconds, not after a timeout of the collectives."""
    source = make_checkpoint(tmp_path / "source", "mixtral", num_hidden_layers=16)
    arguments = settings(source, tmp_path / "run", calibration__samples=64)
    job = subprocess.Popen(
        torchrun(2, ["-m", "jobs.prune", *arguments]), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in job.stdout:
        if "observe 03/" in line:
            break
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.monotonic()
    _, errors = job.communicate(timeout=60)
    assert job.returncode and time.monotonic() - began < 20, errors
    # The other rank may be the first one, which says where it was.
    assert "Signal 9 (SIGKILL)" in errors and "closed by peer" not in errors, errors


@pytest.mark.parametrize("change", ["shorter", "other"])
def test_the_source_changes_under_a_run(tmp_path, ranks, monkeypatch, change):
    source = make_checkpoint(tmp_path / "source", "arctic")
    cfg, queue = request(str(source), tmp_path / "run"), Recorder.layer

    def meddle(self, index, *arguments, **keywords):
        for shard in source.glob("*.safetensors"):
            content = shard.read_bytes()
            shard.write_bytes(content[:-64] if change == "shorter" else content)
            os.utime(shard, ns=(1, 1))
        return queue(self, index, *arguments, **keywords)

    monkeypatch.setattr(Recorder, "layer", meddle)
    with pytest.raises(StunError, match=r"safetensors: has changed since the run began"):
        prune(cfg, ranks)
