"""The run folder: a run's identity, its progress and its results.

<run_dir>/config.yaml     identity of the run: configuration, source and calibration tokens; the hardware it ran on
<run_dir>/stats/          statistics of the first stream, one file per layer with experts
<run_dir>/plan.json       clusters and kept experts of every layer, and the budget
<run_dir>/progress/       one entry per finished layer and rank, until the run is complete
<run_dir>/hidden/         hidden states after the last finished layers, until the run is complete
<run_dir>/model/          the pruned checkpoint
<run_dir>/tracking/       files of trackers (stun.tracking.tracker), if any
<run_dir>/layers.json     measurements of every layer (stun.run.layer_records)
<run_dir>/manifest.json   written last: it exists only in complete runs
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from stun.config import StunError
from stun.files import load_yaml, write_atomically, write_json
from stun.run.identity import COMPUTED_IN, differences
from stun.run.launches import LAUNCHES, check_progress
from stun.run.lock import LOCK, hold
from stun.run.ownership import MARK, discard, own_part, release
from stun.schema import COUNT, NULL, NUMBER, POSITIVE, SHARE, SIZE, TEXT, load_record

MANIFEST = "manifest.json"  # written last of all
STATISTICS, ABOUT = "stats", "about.json"  # folder of statistics, and the file in it that is written last
# Kind of a run's summary, in manifest.json. Runs of older versions lack some fields.
SUMMARY = {
    "target": SHARE,
    "sparsity": NUMBER,
    "parameters": POSITIVE,
    "nonzero": COUNT,
    "experts": [COUNT],
    "kept": [COUNT],
    "groups?": POSITIVE,
    "loads_in": {TEXT: TEXT},
    "ratio": SHARE,
    "ranks": POSITIVE,
    "peak_bytes": COUNT,
    "bytes_read": [COUNT],
    "read_bytes_per_second?": [SIZE],
    "phases?": {TEXT: {TEXT: SIZE}},
    "bytes_written": COUNT,
    "model_type?": TEXT,
    "form?": (NULL, {"source": [TEXT], "bits": SIZE, "written": TEXT}),
    "source?": TEXT,
    "source_bytes?": COUNT,
    "disk_bytes?": COUNT,
    "statistics?": TEXT,
    "command?": TEXT,
    "seconds": SIZE,
}
# Folders that only an unfinished run needs, and patterns of the files that it writes there.
_PART = r"\.?\w+-\d{5}-\d+-of-\d+"
_TEMPORARY = {"progress": rf"{_PART}\.json(\.tmp)?|\.?{LAUNCHES}(\.tmp)?", "hidden": rf"{_PART}\.safetensors(\.tmp)?"}
# Files that may exist before the run: of an interrupted start, and of slurm/prune.sbatch.
_BESIDE = {LOCK, MARK, ".config.yaml.tmp", f".{MARK}.tmp", "code", "logs"}
_OUTPUT = {".out", ".err", ".log"}  # output of a Slurm job


def _check_hardware(run_dir: str, used: object, now: dict, allow_other: bool) -> None:
    """Raise StunError if an interrupted run has `used` other hardware alone, and must not go on elsewhere."""
    if not isinstance(used, list) or not all(isinstance(entry, dict) for entry in used):
        raise StunError(f"run_dir={run_dir}: config.yaml: hardware: must be a list of records")
    if not used or now in used:
        return
    changes = f"run_dir={run_dir}: began on other hardware ({'; '.join(differences(used[-1], now))}); go on there"
    if not allow_other:
        raise StunError(f"{changes}, or with allow_other_hardware=true")
    if used[-1].get(COMPUTED_IN, now.get(COMPUTED_IN)) != now.get(COMPUTED_IN):  # records of older versions have none
        raise StunError(f"{changes}, or where layers are computed in {used[-1][COMPUTED_IN]}: its hidden states are")


class Run:
    """An open run folder."""

    def __init__(self, folder: Path):
        self.folder, self.model, self.stats = folder, folder / "model", folder / STATISTICS
        self.summary: dict | None = None

    @classmethod
    def open(cls, run_dir: str, identity: dict, hardware: dict, allow_other: bool = False) -> Run:
        """Create the folder, or resume in it the run of the same identity, on the same hardware unless other is allowed.

        Raises StunError if it holds another run (naming the differences) or other files.
        """
        run = cls(Path(run_dir))
        config, used = run.folder / "config.yaml", []  # runs of older versions do not say on what they began
        if run.folder.exists() and not run.folder.is_dir():
            raise StunError(f"run_dir={run_dir}: is a file; a folder is needed")
        if config.is_file():
            existing = load_yaml(config)
            used = existing.pop("hardware", used) if isinstance(existing, dict) else used
            if isinstance(existing, dict) and ("statistics" in existing) != ("statistics" in identity):
                kind = "statistics alone (statistics=... uses them)" if "statistics" in existing else "a run that prunes"
                raise StunError(f"run_dir={run_dir}: holds {kind}; choose another folder")
            if changes := differences(existing, identity):
                raise StunError(f"run_dir={run_dir}: holds another run ({'; '.join(changes)}); choose another folder")
        elif run.folder.is_dir() and any(f.name not in _BESIDE and f.suffix not in _OUTPUT for f in run.folder.iterdir()):
            raise StunError(f"run_dir={run_dir}: holds something else; choose an empty or new folder")
        is_complete = os.path.lexists(run.folder / MANIFEST)
        if not is_complete:
            _check_hardware(run_dir, used, hardware, allow_other)
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            if not is_complete:
                hold(run.folder, f"run_dir={run_dir}")
                record = identity | {"hardware": [*used, *([] if hardware in used else [hardware])]}
                write_atomically(config, lambda path: path.write_text(yaml.safe_dump(record, sort_keys=False)))
                run._own_folders()
                check_progress(run.folder / "progress", f"run_dir={run_dir}")
        except OSError as error:
            raise StunError(f"run_dir={run_dir}: cannot be written: {error}") from error
        return run

    def _own_folders(self) -> None:
        """Raise StunError if a folder that this run writes to is a link or another's. Called before files in it are read,
        written or removed."""
        for part in _TEMPORARY:
            own_part(self.folder / part)
        is_complete = (self.stats / ABOUT).is_file()  # complete statistics are only read, and may be another run's
        later = [self.model] if is_complete else [self.model, self.stats]
        for folder in filter(os.path.lexists, later):
            own_part(folder)

    def read_summary(self) -> dict | None:
        """Summary of a complete run; None while it is not complete."""
        manifest = self.folder / MANIFEST
        if not os.path.lexists(manifest):
            return None
        advice = "remove it and the folder `model` to run again"
        summary = load_record(manifest, {"summary": SUMMARY}, advice)["summary"]
        pairs = zip(summary["kept"], summary["experts"], strict=False)
        if len(summary["kept"]) != len(summary["experts"]) or any(kept > experts for kept, experts in pairs):
            raise StunError(f"{manifest}: summary.kept: must be experts of the layers in summary.experts; {advice}")
        return summary

    def finish(self, summary: dict) -> None:
        """Mark the run complete, and remove the files that only an unfinished one needs."""
        write_json(self.folder / MANIFEST, {"summary": summary})
        self.clear()

    def clear(self) -> None:
        """Remove the files that only an unfinished run needs."""
        is_gone = [discard(self.folder / name, written) for name, written in _TEMPORARY.items()]
        for folder in (self.model, self.stats):
            release(folder)
        (self.folder / LOCK).unlink(missing_ok=True)
        if all(is_gone):  # else the marks of folders that hold other files must go on meaning this run
            release(self.folder)
