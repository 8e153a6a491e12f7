"""Runs of jobs.prune and of the scripts in `peers`, each in a process of its own, and their figures."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from stun.benchmark.checkpoints import forget
from stun.config import PruneConfig, StunError
from stun.files import load_json
from stun.model.architecture import Architecture
from stun.preflight.time import forward_flop
from stun.run.identity import plain

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SCRIPTS = Path(__file__).absolute().parent / "peers"
_BEFORE = ("load", "trial")  # phases before the measured work
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b.*")


def run_alone(command: list[str], folder: Path | None = None, **variables: str) -> tuple[subprocess.CompletedProcess, float]:
    """Run a command outside this process' launch, in `folder` and with these environment variables; returns the completed
    process and its wall seconds."""
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, text=True, errors="replace")
    return done, time.perf_counter() - start


def run_prune(cfg: PruneConfig, model: Path, run: Path, ranks: int = 0) -> dict:
    """Run jobs.prune of the checkpoint `model`, dropped from the system's cache before, in the folder `run`, under torchrun on
    `ranks` ranks or, for 0, in a plain process; returns its summary with `wall_seconds` of the process. Raises StunError if it
    fails."""
    cfg, config = replace(cfg, model=replace(cfg.model, path=str(model)), run_dir=str(run)), Path(f"{run}.yaml").absolute()
    forget(model)
    settings = {field.name: plain(getattr(cfg, field.name)) for field in fields(PruneConfig)}
    config.write_text(yaml.safe_dump({"defaults": ["prune", "_self_"], **settings}))
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    job = ["-m", "jobs.prune", f"--config-dir={config.parent}", f"--config-name={config.stem}"]
    done, seconds = run_alone([sys.executable, *(torchrun if ranks else ()), *job])
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")] or done.stderr.splitlines()[-1:]
        raise StunError(f"jobs.prune of {model}: {' '.join(errors).removeprefix('error: ')}")
    return load_json(run / "manifest.json")["summary"] | {"wall_seconds": seconds}


def run_peer(python: str, script: str, folder: Path, device: torch.device, *arguments: object) -> dict:
    """Run a script with the interpreter `python` in `folder`, where it may write files. It sees no GPU where `device` is a CPU.

    Returns its report with the `seconds` of its work, of its `phases`, and `wall_seconds` of the process. A peer's failure is a
    result too: the `reason` alone.
    """
    variables = {"HF_HUB_OFFLINE": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {})
    try:
        done, seconds = run_alone([python, str(_SCRIPTS / f"{script}.py"), *map(str, arguments)], folder, **variables)
    except OSError as error:
        return {"reason": f"failed: {error}"}
    if done.returncode:
        return {"reason": f"failed: {_last_error(done.stderr) or f'it ended with status {done.returncode}'}"}
    try:
        report = json.loads(done.stdout.splitlines()[-1])
        phases, figures = report["seconds"], {"wall_seconds": seconds, "peak_bytes": int(report["peak_bytes"])}
        return {**report, "seconds": sum(phases[name] for name in phases if name not in _BEFORE), "phases": phases, **figures}
    except (LookupError, ValueError, TypeError):
        return {"reason": "failed: its last line is no report"}


def _last_error(output: str) -> str:
    """Last line that names an error, or else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return ([line for line in lines if _ERROR.fullmatch(line)] or lines or [""])[-1][:300]


def figures(summary: dict) -> dict:
    """Figures of a run for every case: seconds of the work and of the whole process, peak bytes of a rank, phases."""
    return {name: summary[name] for name in ("seconds", "wall_seconds", "peak_bytes", "phases")}


def computed_flop(summary: dict, arch: Architecture, tokens: int, length: int) -> int:
    """FLOP of the forwards in a run's streams. The pruned last layer is not run."""
    phases = {name for stream in summary["phases"].values() for name in stream}
    whole, measured = (forward_flop(arch, tokens, length, gives_outputs) for gives_outputs in (True, False))
    after = whole // len(arch.layers) * (len(arch.layers) - 1)
    return sum(flop for name, flop in (("observe", whole), ("measure", measured), ("propagate", after)) if name in phases)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint (dtype, shape and bytes), by name."""
    by_name = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
            by_name[name] = digest.hexdigest()
    return by_name
