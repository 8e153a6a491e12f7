"""The run folder: what a run was asked, what it has finished.

<run_dir>/config.yaml     what identifies the run: its configuration, source and calibration tokens
<run_dir>/stats/          statistics of the first stream, one file a layer that has any
<run_dir>/plan.json       clusters and kept experts of every layer, and the budget
<run_dir>/progress/       an entry for every finished layer and rank, while the run is not complete
<run_dir>/hidden/         hidden states after the last finished layers, while the run is not complete
<run_dir>/model/          the pruned checkpoint
<run_dir>/manifest.json   written last: its existence means that the run is complete
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from stun.checkpoint import Checkpoint, write_atomically, write_json, write_tensors
from stun.config import PruneConfig, StunError
from stun.data import Samples
from stun.headers import read_header
from stun.inputs import is_count, load_json, read_bytes
from stun.stats import COSINE_UNIT


def _plain(value: object) -> object:
    """Enums by name, dataclasses as mappings, containers of plain values: what YAML can hold."""
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def model_digest(source: Checkpoint) -> str:
    """Tells checkpoints apart, from config.json, the headers, and some of the weights."""
    shapes = sorted((name, str(info.dtype), info.shape) for name, info in source.tensors.items())
    return hashlib.sha256(json.dumps([source.config, shapes, source.sampled()], sort_keys=True).encode()).hexdigest()


def fingerprint(cfg: PruneConfig, source: Checkpoint, samples: Samples | None) -> dict:
    """What decides the result of a run. The number of ranks is not in it, since the result does not depend on it."""
    names = [f.name for f in fields(PruneConfig) if f.name not in ("run_dir", "statistics")]
    config = {name: _plain(getattr(cfg, name)) for name in names}
    config["sparsify"].pop("gram_gib")  # how often a layer runs changes nothing
    text = None if samples is None else hashlib.sha256(samples.tokens_ST.numpy().tobytes()).hexdigest()
    files = {"plan_content": cfg.plan, "ratios_content": cfg.sparsify.ratios_file}
    contents = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None for name, file in files.items()}
    return {"config": config, "source": model_digest(source), "calibration_tokens": text, **contents}


def observed(cfg: PruneConfig, source: Checkpoint, samples: Samples) -> dict:
    """What decides the statistics of the first stream, beside whether they hold outliers."""
    identity = fingerprint(cfg, source, samples)
    tokens, size = identity["calibration_tokens"], cfg.calibration.micro_batch
    return {"model": identity["source"], "sources": samples.sources, "calibration_tokens": tokens, "micro_batch": size}


def _differences(old: object, new: object, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)]
    return [] if old == new else [f"{where}: {old} there, {new} now"]


class _Plain(yaml.SafeLoader):
    """Without aliases, of which a few lines can make more than any memory holds."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"line {self.peek_event().start_mark.line + 1}: an alias")
        return super().compose_node(parent, index)


def _load_yaml(file: Path) -> object:
    try:
        return yaml.load(read_bytes(file), _Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise StunError(f"{file}: cannot be read as YAML: {error}") from error


_RETAKE = "take the statistics anew in another run_dir"
_TEMPORARY = ("progress", "hidden")
_BESIDE = {".config.yaml.tmp", "code", "logs"}  # what may be there before the run: the start of one, slurm/prune.sbatch


class Run:
    """An open run folder."""

    def __init__(self, folder: Path):
        self.folder, self.model, self.stats = folder, folder / "model", Statistics(folder / "stats")

    @classmethod
    def open(cls, run_dir: str, identity: dict) -> Run:
        """Create the folder, or continue in one that the same run made.

        Raises StunError where it holds another run (naming what differs) or something else.
        """
        run = cls(Path(run_dir))
        config = run.folder / "config.yaml"
        if run.folder.exists() and not run.folder.is_dir():
            raise StunError(f"run_dir={run_dir}: is a file; a folder is needed")
        if config.is_file():
            differences = _differences(_load_yaml(config), identity)
            if differences:
                raise StunError(f"run_dir={run_dir}: holds another run ({'; '.join(differences)}); choose another folder")
        elif run.folder.is_dir() and any(file.name not in _BESIDE for file in run.folder.iterdir()):
            raise StunError(f"run_dir={run_dir}: holds something else; choose an empty or new folder")
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(config, lambda path: path.write_text(yaml.safe_dump(identity, sort_keys=False)))
            for name in _TEMPORARY:
                (run.folder / name).mkdir(exist_ok=True)
        except OSError as error:
            raise StunError(f"run_dir={run_dir}: cannot be written: {error}") from error
        return run

    @property
    def summary(self) -> dict | None:
        """The finished run's summary, None while it is not finished."""
        manifest = self.folder / "manifest.json"
        if not manifest.is_file():
            return None
        summary = load_json(manifest).get("summary")
        if not isinstance(summary, dict):
            raise StunError(f"{manifest}: summary: must be an object; remove the file to have the run finished again")
        return summary

    def finish(self, summary: dict) -> None:
        """Declare the run complete, and remove what only an unfinished one needs."""
        write_json(self.folder / "manifest.json", {"summary": summary})
        self.clear()

    def clear(self) -> None:
        """Remove what only an unfinished run needs."""
        for name in _TEMPORARY:
            shutil.rmtree(self.folder / name, ignore_errors=True)


class Statistics:
    """What the first stream saw, in the folder `stats` of a run: a file a layer, and about.json, which is written last.

    A layer's tensors, for S calibration sources: `router_distance` [E, E] float64, `coactivation` and `agreement` [S, E, E]
    int64 (the latter in units of 1 / `cosine_unit`), `powers` [S, E, 3, 3] and `peak` [S, E] float64
    (stun.stats.OutputPowers), `weights` [E, 3] float64 (stun.stats.weight_sums). Where outliers were asked for, a layer with or
    without experts also holds histograms of Wanda's scores per token and the sums of these scores (stun.outliers):
    `outliers` [E, bins] and `outlier_sums` [E] of the experts, `outliers of NAME` [bins] and `sum of NAME` [] of every dense
    matrix.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._about = folder / "about.json"

    @property
    def complete(self) -> bool:
        return self._about.is_file()

    @property
    def about(self) -> dict:
        """What they were taken on (`observed`), the unit of cosines, the files' digests."""
        about = load_json(self._about)
        kinds = {"sources": dict, "model": str, "calibration_tokens": str, "micro_batch": int, "cosine_unit": int, "files": dict}
        for name, kind in kinds.items():
            if type(about.get(name)) is not kind:
                raise StunError(f"{self._about}: {name}: must be {kind.__name__}, is {str(about.get(name))[:80]}; {_RETAKE}")
        if not about["sources"] or not all(map(is_count, about["sources"].values())) or about["cosine_unit"] != COSINE_UNIT:
            raise StunError(f"{self._about}: sources must map names to samples, and cosine_unit be {COSINE_UNIT}; {_RETAKE}")
        return about

    @property
    def sources(self) -> list[str]:
        return list(self.about["sources"])

    @property
    def cosine_unit(self) -> int:
        return self.about["cosine_unit"]

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def save(self, layer: int, statistics: dict[str, torch.Tensor]) -> None:
        self.folder.mkdir(exist_ok=True)
        write_tensors(self._file(layer), statistics)

    def load(self, layer: int, experts: int | None = None) -> dict[str, torch.Tensor]:
        """A layer's statistics. Raises StunError where they are not as they were taken, or of another number of `experts`."""
        file = self._file(layer)
        try:
            about, infos = self.about if self.complete else {}, read_header(file)
            if about and about["files"].get(file.name) != _digest(file):
                raise StunError(f"{file}: is damaged: {self._about.name} has another digest; {_RETAKE}")
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise StunError(f"{file}: cannot be read: {error}") from error
        if about and (experts is not None or "router_distance" in infos):
            _check_statistics(file, found, len(about["sources"]), experts)
        return found

    def outliers(self, layer: int) -> dict[str, torch.Tensor]:
        """The statistics of a layer, which hold outliers. Raises StunError where they were not asked for."""
        found = self.load(layer) if self._file(layer).is_file() else {}
        if not any(name.startswith("outlier") for name in found):
            raise StunError(f"{self.folder}: its statistics hold no outliers; a run with sparsify.ratios=owl takes them")
        return found

    def finish(self, taken_on: dict) -> None:
        """Declare the statistics complete; `taken_on` is what decided them (`observed`)."""
        self.folder.mkdir(exist_ok=True)
        files = {file.name: _digest(file) for file in sorted(self.folder.glob("layer-*.safetensors"))}
        write_json(self._about, {**taken_on, "cosine_unit": COSINE_UNIT, "files": files})

    def check(self, wanted: dict) -> None:
        """Raises StunError where they are not complete, or were not taken on what is `wanted` (`observed`)."""
        if not self.complete:
            raise StunError(f"{self.folder}: holds no complete statistics; python -m jobs.observe takes them")
        differences = _differences({name: self.about.get(name) for name in wanted}, wanted)
        if differences:
            raise StunError(f"{self.folder}: its statistics are of something else ({'; '.join(differences)})")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _check_statistics(file: Path, found: dict[str, torch.Tensor], sources: int, experts: int | None) -> None:
    """Raise StunError where one of a layer's tensors is missing, has another form, or holds what no stream counts."""
    count = len(found["router_distance"]) if experts is None else experts
    of_experts = (sources, count)
    wanted = {
        "router_distance": ((count, count), torch.float64),
        "coactivation": ((*of_experts, count), torch.int64),
        "agreement": ((*of_experts, count), torch.int64),
        "powers": ((*of_experts, 3, 3), torch.float64),
        "peak": (of_experts, torch.float64),
        "weights": ((count, 3), torch.float64),
    }
    for name, (shape, dtype) in wanted.items():
        tensor = found.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype is not dtype:
            is_now = "missing" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise StunError(f"{file}: {name}: must be {shape} of {dtype}, is {is_now}; {_RETAKE}")
        if not torch.isfinite(tensor).all() or (name != "agreement" and (tensor < 0).any()):
            raise StunError(f"{file}: {name}: has negative or infinite entries; {_RETAKE}")
