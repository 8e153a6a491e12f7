"""Runs of the scripts in `peers`, each in its own process, and their figures."""

import json
import re
from pathlib import Path

import torch

from stun.benchmark.runs import run_alone

_SCRIPTS = Path(__file__).absolute().parent / "peers"
_BEFORE = ("load", "trial")  # phases before the measured work
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b.*")


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
