"""What a run will need, before it starts: bytes, tokens, memory, disk and minutes; and whether that is there.

Nothing but headers, the configuration and a probe of the disk is read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stun.arch import Architecture
from stun.budget import LayerSize, experts_to_drop, measure_layers
from stun.checkpoint import Checkpoint
from stun.config import ClusterConfig, PruneConfig, SparsifyConfig, StunError, validate
from stun.footprint import Footprint, Memory
from stun.hardware import GIB, Launch, described, disk_free, resident, this_launch
from stun.plan import Plan
from stun.planfile import read_plan
from stun.ranks import Ranks
from stun.search import reachable
from stun.sparsify.matrix import sparsify
from stun.traffic import (
    Disk,
    bytes_read,
    bytes_there,
    compressed_bytes,
    model_bytes,
    snapshots_on_disk,
    stand_in,
    statistics_bytes,
)

SURE = 0.85  # of an estimate: what is refused for lack of it; memory is met within 15 %
_SAMPLE = 256  # rows and columns of the matrix on which pruning is timed


@dataclass(frozen=True)
class Estimate:
    """What one run needs on one launch. `read` are bytes by stream and rank, `written` those of the model, `snapshots` of hidden
    states over the whole run; `free` is the disk's, `minutes` are by stream."""

    launch: Launch
    layers: int
    experts: int
    tokens: int
    read: dict[str, list[int]]
    written: int
    snapshots: int
    memory: Memory
    disk: Disk
    free: int
    minutes: dict[str, float]

    @property
    def host_needed(self) -> int:
        """Bytes that the ranks of a node need together."""
        return self.memory.host * self.launch.per_node


@dataclass(frozen=True)
class Job:
    """What is asked of a model: `plan` has at least the right numbers of experts, `candidates` are splits to be searched."""

    cfg: PruneConfig
    arch: Architecture
    sizes: list[LayerSize]
    plan: Plan
    is_given: bool = False
    candidates: int = 0

    @property
    def streams(self) -> dict[str, bool]:
        """The streams over the layers, and whether each runs the model."""
        drops, how = any(len(layer.clusters) < layer.experts for layer in self.plan.layers), self.cfg.sparsify
        observes = (drops and not self.is_given) or (self.plan.zeros and how.counts_outliers) or self.candidates
        is_there = (Path(self.cfg.run_dir) / "stats" / "about.json").is_file()
        first = {"observe": True} if observes and not is_there else {}
        search = {"search": True} if self.candidates else {}
        return first | search | {"prune": bool(self.plan.zeros and how.reads_inputs)}


def estimate(job: Job, launch: Launch) -> Estimate:
    """What `job` needs on `launch`."""
    cfg, arch, streams = job.cfg, job.arch, job.streams
    samples, length = cfg.calibration.samples, cfg.calibration.length
    footprint = Footprint(arch, cfg, job.plan, launch, streams, job.candidates)
    states = samples * length * arch.config.hidden_size * footprint.dtype.itemsize
    recorded = sum(runs for name, runs in streams.items() if name != "search")
    written = compressed_bytes(arch, job.sizes, job.plan) if cfg.compress else model_bytes(arch, job.plan)
    observed = statistics_bytes(arch, len(cfg.calibration.sources), cfg.sparsify.counts_outliers) if "observe" in streams else 0
    disk = Disk(written, states * snapshots_on_disk(len(arch.layers), recorded), observed, bytes_there(cfg.run_dir))
    read = bytes_read(arch, job.plan, launch.world, streams)
    snapshots = states * (len(arch.layers) - 1) * recorded
    minutes = _minutes(job, launch, read, written, snapshots)
    experts = sum(layout.num_experts for layout in arch.layers)
    place = disk_free(cfg.run_dir)
    return Estimate(
        launch, len(arch.layers), experts, samples * length, read, written, snapshots, footprint.peak(), disk, place, minutes
    )


def _minutes(job: Job, launch: Launch, read: dict[str, list[int]], written: int, snapshots: int) -> dict[str, float]:
    """Minutes of every stream: the longest of reading, computing and writing, which run side by side, and the reading of the first
    layer, for which all wait. What is written counts as fast as what is read."""
    tokens = job.cfg.calibration.samples * job.cfg.calibration.length
    forward = 2 * _active(job.arch) * tokens / (launch.world * launch.flops)
    streams, found = job.streams, {}
    for name, ranks in read.items():
        bytes_a_node = max(sum(ranks[start : start + launch.per_node]) for start in range(0, len(ranks), launch.per_node))
        reading = bytes_a_node / launch.read + max(ranks) / launch.link
        computing = forward * _forwards(job, launch, name) if streams[name] else 0.0
        masking = _masking(job, launch) * {"observe": 0, "search": job.candidates, "prune": 1}[name]
        writing = ((written if name == "prune" else 0) + snapshots / max(1, len(read))) / launch.nodes / launch.read
        found[name] = (max(reading, computing + masking, writing) + reading / len(job.arch.layers)) / 60
    return found


def _active(arch: Architecture) -> int:
    """Parameters of the decoder layers' matrices that a token meets."""
    total = 0
    for layout in arch.layers:
        total += sum(arch.info(name).numel for name in layout.dense if len(arch.info(name).shape) == 2)
        parts = layout.experts[0] if layout.experts else ()
        total += arch.top_k * sum(info.numel for part in parts for info in arch.piece(layout, 0, part))
    return total


def _forwards(job: Job, launch: Launch, stream: str) -> int:
    """How often every layer runs in a stream: to be measured, once for each block of Gram matrices, and to go on."""
    how = job.cfg.sparsify
    if stream == "observe":
        return 1
    blocks = _gram_blocks(job, launch) if how.reads_grams else 1
    once = blocks * (2 if how.reconstruct else 1) + 1
    return 1 + job.candidates * once if stream == "search" else once


def _gram_blocks(job: Job, launch: Launch) -> int:
    layout = next((layout for layout in job.arch.layers if layout.experts), None)
    if layout is None:
        return 1
    shapes = [job.arch.piece(layout, 0, part)[0].shape for part in layout.experts[0]]
    needed = sum(4 * shape[0 if layout.is_transposed else 1] ** 2 for shape in shapes if len(shape) > 1)
    size = max(1, int(job.cfg.sparsify.gram_gib * 2**30 / (needed * (2 if job.cfg.sparsify.reconstruct else 1))))
    return -(-(-(-layout.num_experts // launch.world)) // size)


def _masking(job: Job, launch: Launch) -> float:
    """Seconds of a rank to choose single weights: those of a small matrix here, for as many weights, scaled to another machine as
    products are. With Gram matrices the cost of a weight grows with the width."""
    if not job.plan.zeros:
        return 0.0
    seconds = time_of_weight(job.cfg.sparsify)
    if job.cfg.sparsify.reads_grams:
        seconds *= max(1.0, job.arch.config.hidden_size / _SAMPLE)
    return seconds * job.plan.scope_size / launch.world * (launch.here / launch.flops)


def time_of_weight(how: SparsifyConfig) -> float:
    """Seconds for each weight of a small matrix, on this machine's CPU."""
    generator = torch.Generator().manual_seed(0)
    weight_OD, rows_TD = (
        torch.randn(_SAMPLE, _SAMPLE, generator=generator),
        torch.randn(2 * _SAMPLE, _SAMPLE, generator=generator),
    )
    moment = rows_TD.T @ rows_TD if how.reads_grams else rows_TD.square().sum(0).double()
    start = time.perf_counter()
    sparsify(how, weight_OD, moment if how.reads_inputs else None, weight_OD.numel() // 2, "a sample")
    return (time.perf_counter() - start) / weight_OD.numel()


def report(found: Estimate) -> list[str]:
    """The lines to print."""
    launch, read = found.launch, {name: sum(ranks) for name, ranks in found.read.items()}
    streams = ", ".join(f"{name} {_size(total)}" for name, total in read.items())
    most = max(sum(ranks) for ranks in zip(*found.read.values(), strict=True))
    gpu = f"{_size(found.memory.gpu)} of {_size(launch.gpu_memory)} of a GPU, " if launch.gpu_memory else ""
    host = f"{_size(found.host_needed)} of {_size(launch.host_memory)} of a node"
    minutes = ", ".join(f"{name} {value:.1f}" for name, value in found.minutes.items())
    kind = "measured here" if not launch.gpu_memory else "assumed, 0.3 of the data sheet"
    speeds = f"{launch.flops / 1e12:.3g} TFLOP/s a rank ({kind}), {launch.read / GIB:.2g} GiB/s a node"
    lines = {
        "launch": f"{launch.world} ranks on {launch.nodes} nodes, {launch.name}; {speeds}",
        "model": f"{found.layers} layers, {found.experts} experts; {found.tokens:,} calibration tokens",
        "reads": f"{_size(sum(read.values()))} ({streams}), at most {_size(most)} a rank",
        "writes": f"{_size(found.written)} of model, {_size(found.snapshots)} of hidden states",
        "memory": f"{gpu}{host} ({_size(found.memory.host)} a rank); most at {found.memory.phase}",
        "disk": f"{_size(found.disk.needed)} needed, {_size(found.free)} free",
        "time": f"about {sum(found.minutes.values()):.1f} minutes ({minutes})",
    }
    return [f"{name:7s} {line}" for name, line in lines.items()]


def _size(nbytes: float) -> str:
    """Bytes in GiB, as many digits as say something."""
    value = nbytes / GIB
    return f"{value:,.0f} GiB" if value >= 100 else f"{value:.1f} GiB" if value >= 1 else f"{value:.2f} GiB"


def shortages(found: Estimate) -> list[tuple[str, float, float]]:
    """(what, bytes needed, bytes there) of everything that is short, by the estimates as they are."""
    launch = found.launch
    rows = [
        ("disk", found.disk.needed, found.free),
        ("host memory of a node", found.host_needed, launch.host_memory),
        ("GPU memory of a rank", found.memory.gpu, launch.gpu_memory),
    ]
    return [row for row in rows if row[1] > row[2]]


def check(job: Job, launch: Launch) -> tuple[list[str], str]:
    """The lines to print, with a warning where it is close, and why it cannot fit, empty where it may."""
    found = estimate(job, launch)
    lines, refusals = report(found), []
    for what, needed, there in shortages(found):
        share = 1.0 if what == "disk" else SURE
        text = f"{what}: about {_size(needed)} needed, {_size(there)} there"
        if share * needed > there:
            refusals.append(text)
        else:
            lines.append(f"warning: {text}")
    if not refusals:
        return lines, ""
    elsewhere = [f"run_dir={job.cfg.run_dir} is on that disk" for text in refusals if text.startswith("disk")]
    advice = "; ".join(elsewhere + _advice(job, launch))
    return lines, f"does not fit: {'; '.join(refusals)}. {advice}"


def _fits(job: Job, launch: Launch) -> bool:
    memory = Footprint(job.arch, job.cfg, job.plan, launch, job.streams, job.candidates).peak()
    return memory.host * launch.per_node <= launch.host_memory and memory.gpu <= launch.gpu_memory


def _advice(job: Job, launch: Launch) -> list[str]:
    """The first change of each kind after which the memory fits."""
    if _fits(job, launch):
        return []
    advice, unit = [], "GPUs" if launch.gpu_memory else "ranks, each on a node of its own"
    for power in range(13):
        world = 2**power
        per_node = min(world, launch.per_node) if launch.gpu_memory else 1
        if _fits(job, replace(launch, nodes=world // per_node, per_node=per_node)):
            advice.append(f"{world} {unit} would do")
            break
    calibration, how = job.cfg.calibration, job.cfg.sparsify
    for size in (2**power for power in range(calibration.micro_batch.bit_length() - 1, -1, -1)):
        if size < calibration.micro_batch and _fits(_with(job, calibration=replace(calibration, micro_batch=size)), launch):
            advice.append(f"calibration.micro_batch={size} would do")
            break
    for part in (2, 4, 8, 16, 32) if how.reads_grams else ():
        if _fits(_with(job, sparsify=replace(how, gram_gib=how.gram_gib / part)), launch):
            advice.append(f"sparsify.gram_gib={how.gram_gib / part:g} would do")
            break
    return advice or [
        "no number of ranks, calibration.micro_batch or sparsify.gram_gib alone would do; lower calibration.samples"
    ]


def _with(job: Job, **changes) -> Job:
    return replace(job, cfg=replace(job.cfg, **changes))


def open_job(cfg: PruneConfig) -> Job:
    """The job that a configuration asks for. Raises StunError where it cannot be."""
    validate(cfg)
    arch = Architecture(Checkpoint.open(cfg.model.path))
    sizes = measure_layers(arch, cfg.sparsify.scope)
    given = read_plan(cfg.plan, arch, sizes, cfg, cfg.target) if cfg.plan else None
    return make_job(cfg, arch, sizes, given)


def make_job(cfg: PruneConfig, arch: Architecture, sizes: list[LayerSize], given: Plan | None) -> Job:
    """The job with the plan `given`, or one that has the numbers of the plan to be made. Of splits to be searched it is the one
    that leaves most experts."""
    if given:
        return Job(cfg, arch, sizes, given, is_given=True)
    fractions = reachable(cfg, arch, sizes) if cfg.experts.fraction == "auto" else []
    own = replace(cfg, experts=replace(cfg.experts, fraction=min(fractions))) if fractions else cfg
    plan = stand_in(own, arch, sizes, experts_to_drop(own, sizes, arch))
    return Job(cfg, arch, sizes, plan, candidates=len(fractions))


def preflight(job: Job, ranks: Ranks, cluster: ClusterConfig | None = None) -> None:
    """Print what `job` needs on this launch, or on `cluster`. All ranks call this together; raises StunError, on all of them,
    where it cannot fit."""
    base = max(ranks.gather_objects(resident()))

    def look() -> None:
        source = job.arch.source
        launch = described(cluster, source, base) if cluster and cluster.nodes else this_launch(ranks, source, base)
        lines, refusal = check(job, launch)
        for line in lines:
            ranks.log(line)
        if refusal:
            raise StunError(refusal)

    ranks.on_first(look)
