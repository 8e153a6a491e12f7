"""Folder of a finished run, read for a report."""

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
from stun.report.runs import RESULT
from stun.run.folder import Run
from stun.run.layer_records import FILE, LAYERS
from stun.schema import COUNT, NUMBER, TEXT, Leaf, load_record, misfit
from stun.statistics.store import Statistics

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
