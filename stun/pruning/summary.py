"""Summary of a finished run for manifest.json, and the measurements of its streams for layers.json."""

import os
import re
import shlex
import sys
from pathlib import Path

from stun.checkpoint.hub import masked
from stun.files import load_json, write_json
from stun.model import runtimes
from stun.planning.job import Job
from stun.planning.plan import Plan
from stun.pruning.output import Written
from stun.run.folder import Run
from stun.run.layer_metrics import parameters_by_kind
from stun.run.layer_records import FILE, observed_layer, pruned_layer, read_observed
from stun.run.ledger import Ledger
from stun.runtime.ranks import Ranks

_SECRET_KEY = re.compile(r"([\w.+-]*(?:token|secret|password|passwd|key|credentials?)=).+", re.I)


def command_line(arguments: list[str]) -> str:
    """The command with these `sys.argv`, with what may be a secret masked."""
    program, *rest = arguments
    start = ["stun", Path(program).stem] if Path(program).parent.name == "jobs" else [Path(program).name]
    return shlex.join([*start, *(masked(_SECRET_KEY.sub(r"\1***", word)) for word in rest)])


def summarise(job: Job, plan: Plan, written: Written, run: Run, ranks: Ranks) -> dict:
    """Content of manifest.json, except the seconds the run took. All ranks call this together."""
    cfg, arch = job.cfg, job.arch
    kept = [len(experts) for experts in written.kept[: len(plan.layers)]]
    stored = [plan.most if count and job.is_padded else count for count in kept]  # with experts of zeros
    entries = [entry for layer in written.layers[: len(plan.layers)] for entry in layer]
    nonzero = sum(count for entry in entries for count in entry["nonzero"].values())
    return {
        "target": plan.target,
        "sparsity": 1 - nonzero / plan.parameters,
        "parameters": plan.parameters,
        "nonzero": nonzero,
        "experts": [layer.experts for layer in plan.layers],
        "kept": kept,
        "groups": arch.groups,
        "loads_in": runtimes.runtimes(arch.class_name, stored, job.has_novices, arch.is_grouped),
        "experts_without_tokens": sum(layer[0]["unseen"] for layer in written.layers[: len(plan.layers)]),
        "ratio": plan.ratio,
        "ranks": ranks.world,
        "peak_bytes": max(ranks.gather_objects(ranks.peak_memory())),
        "bytes_read": ranks.gather_objects(arch.source.bytes_read),
        "read_bytes_per_second": ranks.gather_objects(ranks.meter.bytes_read / max(ranks.meter.read_seconds, 1e-9)),
        "phases": {stream: dict(seconds) for stream, seconds in ranks.meter.seconds.items()},
        "bytes_written": sum(size for entry in written.files for size in entry["tensors"].values()),
        "model_type": arch.model_type,
        "form": _form(job),
        "source": cfg.model.path,
        "source_bytes": arch.source.file_bytes,
        "disk_bytes": ranks.on_first(lambda: sum(file.stat().st_size for file in run.model.glob("*.safetensors"))),
        "statistics": os.path.relpath(cfg.statistics, run.folder) if cfg.statistics else "",
        "command": command_line(ranks.command or sys.argv),
    }


def _form(job: Job) -> dict | None:
    """Stored forms of the source's quantised weights and their bits a weight, the form they are written in and its bits; None if
    plain weights stay plain."""
    source, grid = job.arch.source, job.grid
    if not source.formats and not grid:
        return None
    bits = source.bits if source.formats else 16
    written = {"written": job.cfg.output.format.name, "written_bits": grid.bits if grid else bits if job.keeps_form else 16}
    return {"source": sorted(source.formats), "bits": bits, **written}


def save_observed(run: Run) -> None:
    """Write layers.json of a folder of statistics, if this launch or an earlier one has taken any."""
    entries = Ledger(run.folder / "progress", "observe").finished()
    if entries and not (run.folder / FILE).is_file():  # a launch that ended while it cleared has written it from all entries
        write_json(run.folder / FILE, {"observe": [observed_layer(layer) for layer in entries]})


def save_layers(job: Job, written: Written, run: Run) -> dict:
    """Write layers.json of a run that prunes; returns its content."""
    cfg, arch = job.cfg, job.arch
    observed = [observed_layer(entries) for entries in Ledger(run.folder / "progress", "observe").finished()]
    observed = observed if len(observed) == len(arch.layers) else []  # entries may be gone that nothing else needs
    shared = Path(cfg.statistics) / FILE if cfg.statistics else None
    measured = observed or (read_observed(load_json(shared), len(arch.layers)) if shared and shared.is_file() else [])
    dense = [layer.get("powers") for layer in measured] or [None] * len(arch.layers)
    scope, layouts = [kind.name for kind in cfg.sparsify.scope], [*arch.layers, *arch.mtp]
    layers = [
        pruned_layer(entries, parameters_by_kind(arch, layout), scope, powers)
        for entries, layout, powers in zip(written.layers, layouts, [*dense, *(None for _ in arch.mtp)], strict=True)
    ]
    parts = {"observe": observed, "prune": layers[: len(arch.layers)], "mtp": layers[len(arch.layers) :]}
    write_json(run.folder / FILE, parts)
    return parts
