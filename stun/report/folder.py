"""Run folders, read for a report: a finished run with all its files, and the summaries of all runs below a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from stun.config import ExpertsConfig, StunError, experts_from
from stun.evaluation.request import EVALUATION
from stun.files import load_yaml
from stun.model.runtimes import SERVED, SERVED_RESULTS
from stun.planning.plan import LayerPlan
from stun.planning.plan_file import read_layers
from stun.run.folder import MANIFEST, Run
from stun.run.layer_records import FILE, LAYERS
from stun.run.ledger import Ledger
from stun.schema import COUNT, NUMBER, TEXT, Leaf, load_record, misfit
from stun.statistics.store import Statistics

RESULT = "result.json"  # output of jobs.evaluate in the folder of the evaluated run
_FRACTION = Leaf("a number from 0 to 1", lambda value: bool(re.fullmatch(r"[01](\.\d{1,20})?", value)))
_CURVE = {"error?": {_FRACTION: NUMBER}}
_CALIBRATION = {"samples?": COUNT, "length?": COUNT, "mixture?": {TEXT: {}}}
_CONFIG = {"config": {"experts?": {}, "sparsify?": {"scope?": [TEXT]}, "calibration?": _CALIBRATION}}


@dataclass(frozen=True, eq=False)
class RunFolder:
    """Files of a run: `config` of config.yaml, `plan` the layers of plan.json, and `layers`, `search`, `result` and `served`
    of the JSON files of that name, empty if there are none. `stats` are its statistics, its own or shared."""

    path: Path
    config: dict
    experts: ExpertsConfig
    summary: dict
    plan: list[LayerPlan]
    layers: dict
    search: dict
    result: dict
    served: dict
    stats: Statistics | None

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Run folder at `path`. Raises StunError if it is not a complete run of jobs.prune."""
        identity = identity_of(path)
        if identity is None:
            raise StunError(f"folder={path}: holds no run; give a run_dir of stun prune, or a folder with such folders in it")
        if "config" not in identity:
            raise StunError(f"folder={path}: holds statistics alone; a run that prunes (stun prune) has a report")
        summary = Run(path).read_summary()
        if summary is None:
            raise StunError(f"folder={path}: the run is not complete; the command that began it goes on")
        stats = _statistics(path, summary, identity)
        kinds = {FILE: LAYERS, "search.json": _CURVE, RESULT: EVALUATION, SERVED: SERVED_RESULTS}
        parts = {name: load_record(path / name, kind) if (path / name).is_file() else {} for name, kind in kinds.items()}
        if reason := misfit(identity, _CONFIG):
            raise StunError(f"{path / 'config.yaml'}: {reason}")
        config = identity["config"]
        plan, _, _ = read_layers(path / "plan.json")
        experts = experts_from(config.get("experts", {}), f"{path / 'config.yaml'}: experts")
        return cls(path, config, experts, summary, plan, *parts.values(), stats)

    @property
    def has_model(self) -> bool:
        """Whether the checkpoint exists; being large, it may have been moved or removed."""
        return (self.path / "model" / "config.json").is_file()

    @property
    def with_experts(self) -> list[int]:
        """Numbers of the decoder layers with experts."""
        return [number for number, layer in enumerate(self.plan) if layer.experts]


def _statistics(path: Path, summary: dict, identity: dict) -> Statistics | None:
    """Statistics that the run used, its own or shared ones; None if they are missing or were replaced."""
    shared = summary.get("statistics")
    stats = Statistics((path / shared if isinstance(shared, str) and shared else path) / "stats")
    used = {"model": identity.get("source"), "calibration_tokens": identity.get("calibration_tokens")}
    return stats if stats.complete and used.items() <= stats.about.items() else None


def identity_of(path: Path) -> dict | None:
    """Content of config.yaml, None if the folder is not a run's."""
    file = path / "config.yaml"
    content = load_yaml(file) if file.is_file() else None
    return content if isinstance(content, dict) else None


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
