"""Bytes that a run reads, writes and has on disk, from headers and the configuration alone."""

from pathlib import Path

from stun.model.architecture import Architecture, expert_infos
from stun.model.layer_layout import LayerLayout
from stun.planning.job import Job
from stun.planning.plan import owners
from stun.run.snapshots import KEPT
from stun.sparsify.ratios import BINS
from stun.stream.layer_stream import even_owners


def _add_layer(read: list[int], arch: Architecture, layout: LayerLayout, owners: list[int | None]) -> None:
    """Add the bytes of a layer to those that each rank reads."""
    expert = sum(info.stored_bytes for info in expert_infos(arch, layout))
    for place, name in enumerate(layout.copied):
        read[place % len(read)] += arch.info(name).stored_bytes
    for owner in owners:
        if owner is not None:
            read[owner] += expert


def bytes_read(job: Job, world: int) -> dict[str, list[int]]:
    """Bytes that each rank reads, by stream. The experts of one layer are equally large."""
    by_stream, arch = {}, job.arch
    for stream in job.streams:
        is_last = stream == "prune"
        layouts = [*arch.layers, *arch.mtp] if is_last else arch.layers
        even = (even_owners(layout, world) for layout in layouts)
        total = [0] * world
        for layout, own in zip(layouts, owners(job.plan, world, job.runs_dense) if is_last else even, strict=True):
            _add_layer(total, arch, layout, own)
        outer = [*arch.outer] if is_last else [arch.embedding]
        outer += [arch.embedding, *arch.outer_weights] if stream == "search" else []
        total[0] += sum(arch.info(name).stored_bytes for name in outer)
        again = _read_again(job) if is_last and job.keeps_form else 0
        again *= 1 + job.solves(job.plan)  # to be rounded too
        by_stream[stream] = [own + again // world for own in total]
    return by_stream


def _read_again(job: Job) -> int:
    """Bytes of the quantised weights that are kept, which are read once more to be written as they are stored."""
    arch, total = job.arch, 0
    for layout, layer in zip([*arch.layers, *arch.mtp], [*job.plan.layers, *job.plan.mtp], strict=True):
        infos = expert_infos(arch, layout) * len(layer.clusters) + [arch.info(name) for name in layout.copied]
        total += sum(info.stored_bytes for info in infos if info.codec)
    return total + sum(info.stored_bytes for info in map(arch.info, arch.outer) if info.codec)


def statistics_bytes(job: Job) -> int:
    """Bytes of the first stream's statistics (stun.statistics.store)."""
    total, sources, arch = 0, len(job.cfg.calibration.sources), job.arch
    outliers, outputs = job.cfg.sparsify.counts_outliers, job.cfg.experts.sums_outputs
    for layout in arch.layers:
        experts, counted = layout.num_experts, len(layout.linears) + layout.num_experts
        total += 8 * (experts**2 * (1 + sources) + experts * (10 * sources + 3))
        total += counted * (4 * BINS + 8) if outliers else 0
        total += 4 * sources * experts * layout.width if outputs else 0
    return total


def snapshots_on_disk(layers: int, streams: int) -> int:
    """Most sets of all hidden states on disk at once: those of the finished streams, and those of the last stream with the one
    that is being written."""
    finished = min(KEPT - 1, layers - 1)
    return min(KEPT + 1, layers - 1) + finished * (streams - 1) if streams else 0


def existing_bytes(run_dir: str) -> int:
    """Bytes of an interrupted run's files in its folder."""
    parts = [Path(run_dir) / name for name in ("model", "hidden", "stats")]
    return sum(file.stat().st_size for part in parts for file in part.rglob("*") if file.is_file())
