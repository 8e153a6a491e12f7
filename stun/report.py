"""What the run folders of a sweep say, beside one another."""

from __future__ import annotations

from pathlib import Path

import yaml

from stun.checkpoint import load_json
from stun.config import StunError
from stun.ledger import Ledger

RESULT = "result.json"  # of jobs.evaluate, in the folder of the run it evaluated


def runs_in(folder: Path) -> dict[str, dict | str]:
    """The summary of every run below `folder`, by its path there, with an evaluation under `result`; a run that is not complete
    is described in words.

    Raises StunError where there are none.
    """
    runs = {}
    for config in sorted(folder.rglob("config.yaml")):
        if "config" in yaml.safe_load(config.read_text()):  # otherwise it holds statistics alone
            runs[str(config.parent.relative_to(folder))] = _state(config.parent)
    if not runs:
        raise StunError(f"folder={folder}: holds no run folders")
    return runs


def _state(run: Path) -> dict | str:
    if (run / "manifest.json").is_file():
        result = {"result": load_json(run / RESULT)} if (run / RESULT).is_file() else {}
        return load_json(run / "manifest.json")["summary"] | result
    done = {name: len(Ledger(run / "progress", name).finished()) for name in ("prune", "observe") if (run / "progress").is_dir()}
    stream = next((name for name, count in done.items() if count), None)
    return f"not complete: {stream} {done[stream]}" if stream else "not complete"
