"""Files of the pruned checkpoint: shards of the layers, the tensors outside them, config.json, and at last the index."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from stun.checkpoint.reader import INDEX
from stun.checkpoint.writer import copy_extras, extras, write_index
from stun.files import TEMPLATES, load_json, write_json
from stun.model import remote_code
from stun.model.families import PADDED
from stun.model.form_settings import SIDE_FILES, kept_by_block, renumbered
from stun.planning.job import Job
from stun.planning.plan import Plan
from stun.planning.written_form import plain_modules
from stun.pruning.layers import prune_layers
from stun.pruning.padding import padding
from stun.pruning.shards import hub_names, keep_only, write_shard
from stun.report.model_card import CARD, SOURCE_CARD, keep_source_card
from stun.run.folder import Run
from stun.run.ledger import Ledger
from stun.run.ownership import MARK, own_part
from stun.run.recorder import Recorder
from stun.runtime.ranks import Ranks
from stun.stream.layer_stream import embed


@dataclass(frozen=True)
class Written:
    """Ledger entries of the checkpoint's files: that of the tensors outside the layers, and every layer's by rank."""

    outside: dict
    layers: list[list[dict]]

    @property
    def files(self) -> list[dict]:
        return [self.outside, *(entry for entries in self.layers for entry in entries)]

    @property
    def kept(self) -> list[list[int]]:
        """Experts kept of every layer."""
        return [entries[0]["kept"] for entries in self.layers]


def prune_and_write(job: Job, plan: Plan, run: Run, ranks: Ranks) -> Written:
    """Run the second stream and write the checkpoint. All ranks call this together."""
    cfg, arch = job.cfg, job.arch
    source, is_changed = arch.source if job.keeps_form else None, bool(plan.zeros) or job.refits or job.solves(plan)
    recorder = Recorder(run.folder, "prune", ranks, len(arch.layers))
    write = partial(write_shard, run.model, source, is_changed)
    outer: dict[str, torch.Tensor] = {}
    finished = recorder.finished()
    outside = ranks.on_first(lambda: _write_outside(job, run, write, finished, outer))
    states = None
    if job.streams["prune"]:
        batches = job.samples.batches(cfg.calibration.micro_batch)
        states = embed(arch, ranks, batches, lambda name: outer[name] if outer else arch.source.read(name))
        states.dense = replace(states) if job.runs_dense else None
    outer.clear()
    written = Written(outside, prune_layers(job, plan, states, ranks, recorder, write))
    ranks.on_first(lambda: _write_around(job, written, run))
    return written


def _write_outside(job: Job, run: Run, write: Callable, finished: list[list[dict]], outer: dict[str, torch.Tensor]) -> dict:
    """Entry of the file with the tensors outside the layers (embedding, final norm, output head).

    Removes unfinished files of an interrupted launch first. Writes the file unless that launch did, and puts the tensors into
    `outer` if so.
    """
    own_part(run.model)
    source, ledger = job.arch.source, Ledger(run.folder / "progress", "outside")
    known = [entry for entries in ledger.finished() for entry in entries]
    files = known + [entry for entries in finished for entry in entries]
    # The interrupted launch may have ended while it gave its files their final names.
    if len(finished) == len(job.arch.layers) + len(job.arch.mtp):
        for file, name in hub_names(files).items():
            if (run.model / name).is_file():
                (run.model / name).rename(run.model / file)
    others = {MARK, "config.json", INDEX, CARD, SOURCE_CARD, TEMPLATES, remote_code.FILE, *extras(source.folder)}
    keep_only(run.model, files, others)
    if not known:
        outer |= {name: source.read(name) for name in job.arch.outer}
        known = [write("outside.safetensors", outer, {})]
        ledger.record(0, 0, 1, known[0])
    return known[0]


def _write_around(job: Job, written: Written, run: Run) -> None:
    """Give all files their final names and write the rest; the index last, so that an unfinished checkpoint has none."""
    arch, names = job.arch, hub_names(written.files)
    for file, name in names.items():
        (run.model / file).rename(run.model / name)
    copy_extras(arch.source.folder, run.model, skip=(CARD, remote_code.FILE, *SIDE_FILES))
    keep_source_card(arch.source.folder, run.model)
    layouts = [*arch.layers, *arch.mtp]
    stays = [layout.whole for layout in layouts] if job.has_novices else written.kept
    by_block = kept_by_block(layouts, stays) if job.keeps_form else None
    config = remote_code.without_missing(arch.source.folder, _config(job, written.kept, by_block))
    if job.grid:
        config["quantization_config"] = job.grid.settings(plain_modules(arch, job.grid))
    write_json(run.model / "config.json", config)
    remote_code.write_code(run.model, config)
    for file in (arch.source.folder / name for name in SIDE_FILES if by_block is not None):
        if file.is_file():
            write_json(run.model / file.name, renumbered(load_json(file), by_block))
    shards = {names[entry["file"]]: entry["tensors"] for entry in written.files if entry["file"]}
    write_index(run.model, dict(sorted(shards.items())))


def _config(job: Job, kept: list[list[int]], by_block: dict | None) -> dict:
    """config.json for experts kept of every layer and prediction head; `by_block` if the source's stored form is written."""
    arch, own = job.arch, kept[: len(job.arch.layers)]
    counts, most = [len(experts) for experts in own], max(map(len, kept))
    if job.has_novices:
        layouts = zip(arch.layers, own, strict=True)
        removed = {layout.index: sorted(set(range(layout.num_experts)) - set(experts)) for layout, experts in layouts}
        return arch.pruned_config(counts, removed, by_block)
    if not job.is_padded:
        return arch.pruned_config(counts, None, by_block)
    config = arch.pruned_config([most if count else 0 for count in counts], None, by_block)
    zeros = {str(layer): padding(count, most, arch.groups) for layer, count in enumerate(counts) if 0 < count < most}
    return config | ({PADDED: zeros} if zeros else {})
