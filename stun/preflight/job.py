"""What a run will need, before it starts: bytes, tokens, memory, disk and at least how long; and whether that is there.

Nothing but headers, the configuration and a probe of the disk is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stun.config import ClusterConfig, StunError
from stun.planning.budget import model_bytes
from stun.planning.job import Job
from stun.preflight.hardware import Launch, described, disk_free, resident, this_launch
from stun.preflight.memory import Footprint, Memory
from stun.preflight.time import Duration, durations
from stun.preflight.traffic import Disk, bytes_read, bytes_there, snapshots_on_disk, statistics_bytes
from stun.runtime.ranks import Ranks
from stun.runtime.units import count, duration, size

SURE = 0.85  # of an estimate: what is refused for lack of it; memory is met within 15 %


@dataclass(frozen=True)
class Estimate:
    """What one run needs on one launch. `read` are bytes by stream and rank, `written` those of the model, `snapshots` of hidden
    states over the whole run; `free` is the disk's, `durations` are by stream."""

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
    durations: dict[str, Duration]

    @property
    def seconds(self) -> float:
        """Of all streams, at least."""
        return sum(own.seconds for own in self.durations.values())

    @property
    def most_read(self) -> int:
        """Bytes of the rank that reads most, in all streams."""
        return max(sum(ranks) for ranks in zip(*self.read.values(), strict=True))

    @property
    def host_needed(self) -> int:
        """Bytes that the ranks of a node need together."""
        return self.memory.host * self.launch.per_node


def estimate(job: Job, launch: Launch) -> Estimate:
    """What `job` needs on `launch`."""
    cfg, arch, streams = job.cfg, job.arch, job.streams
    samples, length = cfg.calibration.samples, cfg.calibration.length
    footprint = Footprint(job, launch)
    states = samples * length * arch.config.hidden_size * footprint.dtype.itemsize
    recorded = sum(runs for name, runs in streams.items() if name != "search")
    written = model_bytes(arch, job.plan)
    observed = statistics_bytes(arch, len(cfg.calibration.sources), cfg.sparsify.counts_outliers) if "observe" in streams else 0
    disk = Disk(written, states * snapshots_on_disk(len(arch.layers), recorded), observed, bytes_there(cfg.run_dir))
    read = bytes_read(arch, job.plan, launch.world, streams)
    snapshots = states * (len(arch.layers) - 1) * recorded
    return Estimate(
        launch,
        layers=len(arch.layers),
        experts=sum(layout.num_experts for layout in arch.layers),
        tokens=samples * length,
        read=read,
        written=written,
        snapshots=snapshots,
        memory=footprint.peak(),
        disk=disk,
        free=disk_free(cfg.run_dir),
        durations=durations(footprint, read, written, snapshots),
    )


def report(found: Estimate) -> list[str]:
    """The lines to print."""
    launch, read = found.launch, {name: sum(ranks) for name, ranks in found.read.items()}
    streams = ", ".join(f"{name} {size(total)}" for name, total in read.items())
    gpu = f"{size(found.memory.gpu)} of {size(launch.gpu_memory)} of a GPU, " if launch.gpu_memory else ""
    host = f"{size(found.host_needed)} of {size(launch.host_memory)} of a node"
    rank = f"{size(found.memory.host)} a rank, {size(launch.base)} at its start"
    times = ", ".join(f"{name} {duration(own.seconds)} to {own.bound}" for name, own in found.durations.items())
    kind = "data sheet" if launch.gpu_memory else "measured here"
    speeds = f"{launch.flops / 1e12:.3g} TFLOP/s a rank ({kind}), {size(launch.read)}/s a node"
    lines = {
        "launch": f"{count(launch.world, 'rank')} on {count(launch.nodes, 'node')}, {launch.name}; {speeds}",
        "model": f"{count(found.layers, 'layer')}, {count(found.experts, 'expert')}; {found.tokens:,} calibration tokens",
        "reads": f"up to {size(sum(read.values()))} ({streams}), at most {size(found.most_read)} a rank",
        "writes": f"{size(found.written)} of model, {size(found.snapshots)} of hidden states",
        "memory": f"{gpu}{host} ({rank}); most at {found.memory.phase}",
        "disk": f"{size(found.disk.needed)} needed, {size(found.free)} free",
        "time": f"at least {duration(found.seconds)} ({times})",
    }
    return [f"{name:7s} {line}" for name, line in lines.items()]


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
        text = f"{what}: about {size(needed)} needed, {size(there)} there"
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
    memory = Footprint(job, launch).peak()
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
    for fewer in (2**power for power in range(calibration.micro_batch.bit_length() - 1, -1, -1)):
        if fewer < calibration.micro_batch and _fits(_with(job, calibration=replace(calibration, micro_batch=fewer)), launch):
            advice.append(f"calibration.micro_batch={fewer} would do")
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


def preflight(job: Job, ranks: Ranks, cluster: ClusterConfig | None = None) -> None:
    """Print what `job` needs on this launch, or on `cluster`. All ranks call this together; raises StunError, on all of them,
    where it cannot fit."""
    base = max(ranks.gather_objects(resident()))
    if cluster and cluster.nodes:
        launch = ranks.on_first(lambda: described(cluster, job.arch, base))
    else:
        launch = this_launch(ranks, job.arch, job.cfg, base)
    ranks.on_first(lambda: _tell(job, launch, ranks))


def _tell(job: Job, launch: Launch, ranks: Ranks) -> None:
    """Print what is needed. Raises StunError where it cannot fit."""
    lines, refusal = check(job, launch)
    for line in lines:
        ranks.log(line)
    if refusal:
        raise StunError(refusal)
