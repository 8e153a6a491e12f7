"""Summaries of the runs below a folder."""

from pathlib import Path

from stun.config import StunError
from stun.evaluation.request import EVALUATION
from stun.files import load_yaml
from stun.run.folder import MANIFEST, Run
from stun.run.ledger import Ledger
from stun.schema import load_record

RESULT = "result.json"  # output of jobs.evaluate in the folder of the evaluated run


def runs_in(folder: Path) -> dict[str, dict | str]:
    """Summary of every run below `folder`, by relative path, with its evaluation under `result`; a text for incomplete runs.

    Raises StunError if there are none.
    """
    runs = {}
    for config in sorted(folder.rglob("config.yaml")):
        if _is_run(config.parent):
            runs[str(config.parent.relative_to(folder))] = _state(config.parent)
    if not runs:
        raise StunError(f"folder={folder}: holds no run folders")
    return runs


def _is_run(folder: Path) -> bool:
    """Whether a folder with a config.yaml holds a run, and not statistics alone or another program's files."""
    try:
        identity = load_yaml(folder / "config.yaml")
    except StunError:
        return (folder / MANIFEST).is_file()
    return isinstance(identity, dict) and "config" in identity


def _state(folder: Path) -> dict | str:
    try:
        summary, result = Run(folder).read_summary(), folder / RESULT
        if summary:
            return summary | ({"result": load_record(result, EVALUATION)} if result.is_file() else {})
        progress = folder / "progress"
        done = {name: len(Ledger(progress, name).finished()) for name in ("prune", "observe") if progress.is_dir()}
    except StunError as error:
        return f"cannot be read: {error}"
    stream = next((name for name, count in done.items() if count), None)
    return f"not complete: {stream} {done[stream]}" if stream else "not complete"
