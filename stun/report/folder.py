"""A finished run's folder, read for a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stun.config import ExpertsConfig, StunError, experts_from
from stun.inputs import load_json
from stun.plan import LayerPlan, read_layers
from stun.records import FILE
from stun.report.runs import RESULT
from stun.run import Run, load_yaml
from stun.statistics import Statistics


@dataclass(frozen=True)
class RunFolder:
    """What a run left: `config` as it stands in config.yaml; `plan` and `heads` the layers of plan.json; `layers` is layers.json,
    `search` and `result` are those files; each is empty where the run has none. `stats` are its statistics, its own or shared."""

    path: Path
    config: dict
    experts: ExpertsConfig
    summary: dict
    plan: list[LayerPlan]
    layers: dict
    search: dict
    result: dict
    stats: Statistics | None

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Raises StunError where `path` is not the folder of a run that pruned and is complete."""
        identity = identity_of(path)
        if identity is None:
            raise StunError(f"folder={path}: holds no run; give a run_dir of jobs.prune, or a folder with such folders in it")
        if "config" not in identity:
            raise StunError(f"folder={path}: holds statistics alone; a run that prunes (jobs.prune) has a report")
        summary = Run(path).summary
        if summary is None:
            raise StunError(f"folder={path}: the run is not complete; the command that began it goes on")
        shared = summary.get("statistics")
        stats = Statistics((path / shared if isinstance(shared, str) and shared else path) / "stats")
        parts = {name: load_json(path / name) if (path / name).is_file() else {} for name in (FILE, "search.json", RESULT)}
        config = identity["config"] if isinstance(identity["config"], dict) else {}
        plan, _, _ = read_layers(path / "plan.json")
        experts = experts_from(config.get("experts", {}), f"{path / 'config.yaml'}: experts")
        return cls(path, config, experts, summary, plan, *parts.values(), stats if stats.complete else None)

    @property
    def with_experts(self) -> list[int]:
        """Numbers of the decoder layers that have experts."""
        return [number for number, layer in enumerate(self.plan) if layer.experts]


def identity_of(path: Path) -> dict | None:
    """The content of config.yaml, None where there is no folder of a run."""
    file = path / "config.yaml"
    content = load_yaml(file) if file.is_file() else None
    return content if isinstance(content, dict) else None
