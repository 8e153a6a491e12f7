"""Estimate of a run before it starts (tokens, bytes, memory, disk space, least time), and whether the launch has that much.

Reads headers, the configuration and a sample of the disk; the calibration text was read when the job was resolved.
"""

from dataclasses import dataclass, replace

from stun.config import StunError
from stun.planning.budget import model_bytes
from stun.planning.job import Job
from stun.preflight.config import ClusterConfig
from stun.preflight.hardware import Launch, described, disk_free, resident, this_launch
from stun.preflight.memory import Footprint, Memory
from stun.preflight.time import Duration, durations
from stun.preflight.traffic import Disk, bytes_read, existing_bytes, snapshots_on_disk, statistics_bytes
from stun.runtime.ranks import Ranks
from stun.runtime.units import count, duration, size

SURE = 0.85  # refuse if less than this share of the estimate is available: estimates of memory are within 15 %


@dataclass(frozen=True)
class Estimate:
    """Needs of one run on one launch. In bytes: `read` by stream and rank, `written` of the model, `snapshots` of hidden states
    over the whole run, `free` on disk. `durations` are by stream. `text` says how many tokens the calibration text has; empty if
    it was not read."""

    launch: Launch
    layers: int
    experts: int
    tokens: int
    text: str
    read: dict[str, list[int]]
    written: int
    snapshots: int
    memory: Memory
    disk: Disk
    free: int
    durations: dict[str, Duration]

    @property
    def seconds(self) -> float:
        """Least seconds of all streams."""
        return sum(stream.seconds for stream in self.durations.values())

    @property
    def most_read(self) -> int:
        """Bytes read in all streams by the rank that reads most."""
        return max(sum(ranks) for ranks in zip(*self.read.values(), strict=True))

    @property
    def host_needed(self) -> int:
        """Bytes that the ranks of a node need together."""
        return self.memory.host * self.launch.per_node


def estimate(job: Job, launch: Launch) -> Estimate:
    """Needs of `job` on `launch`."""
    cfg, arch, streams = job.cfg, job.arch, job.streams
    samples, length = cfg.calibration.samples, cfg.calibration.length
    footprint = Footprint(job, launch)
    states = samples * length * arch.config.hidden_size * footprint.dtype.itemsize
    recorded = sum(runs for name, runs in streams.items() if name != "search")
    written = model_bytes(arch, job.plan)
    statistics = statistics_bytes(arch, len(cfg.calibration.sources), cfg.sparsify.counts_outliers) if "observe" in streams else 0
    disk = Disk(written, states * snapshots_on_disk(len(arch.layers), recorded), statistics, existing_bytes(cfg.run_dir))
    read = bytes_read(arch, job.plan, launch.world, streams)
    snapshots = states * (len(arch.layers) - 1) * recorded
    return Estimate(
        launch,
        layers=len(arch.layers),
        experts=sum(layout.num_experts for layout in arch.layers),
        tokens=samples * length,
        text=job.samples.available if job.samples else "",
        read=read,
        written=written,
        snapshots=snapshots,
        memory=footprint.peak(),
        disk=disk,
        free=disk_free(cfg.run_dir),
        durations=durations(footprint, read, written, snapshots),
    )


def report(needs: Estimate) -> list[str]:
    """Lines to print."""
    launch, read = needs.launch, {name: sum(ranks) for name, ranks in needs.read.items()}
    streams = ", ".join(f"{name} {size(total)}" for name, total in read.items())
    gpu = f"{size(needs.memory.gpu)} of {size(launch.gpu_memory)} of a GPU, " if launch.gpu_memory else ""
    host = f"{size(needs.host_needed)} of {size(launch.host_memory)} of a node"
    rank = f"{size(needs.memory.host)} a rank, {size(launch.base)} at its start"
    times = ", ".join(f"{name} {duration(stream.seconds)} to {stream.bound}" for name, stream in needs.durations.items())
    kind = "data sheet" if launch.gpu_memory else "measured here"
    speeds = f"{launch.flops / 1e12:.3g} TFLOP/s a rank ({kind}), {size(launch.read)}/s a node"
    tokens = f"{needs.tokens:,} calibration tokens" + (f" of {needs.text} in the text" if needs.text else "")
    lines = {
        "launch": f"{count(launch.world, 'rank')} on {count(launch.nodes, 'node')}, {launch.name}; {speeds}",
        "model": f"{count(needs.layers, 'layer')}, {count(needs.experts, 'expert')}; {tokens}",
        "reads": f"up to {size(sum(read.values()))} ({streams}), at most {size(needs.most_read)} a rank",
        "writes": f"{size(needs.written)} of model, {size(needs.snapshots)} of hidden states",
        "memory": f"{gpu}{host} ({rank}); most at {needs.memory.phase}",
        "disk": f"{size(needs.disk.needed)} needed, {size(needs.free)} free",
        "time": f"at least {duration(needs.seconds)} ({times})",
    }
    return [f"{name:7s} {line}" for name, line in lines.items()]


def shortages(needs: Estimate) -> list[tuple[str, float, float]]:
    """(name, bytes needed, bytes available) for every resource with too little."""
    launch = needs.launch
    rows = [
        ("disk", needs.disk.needed, needs.free),
        ("host memory of a node", needs.host_needed, launch.host_memory),
        ("GPU memory of a rank", needs.memory.gpu, launch.gpu_memory),
    ]
    return [row for row in rows if row[1] > row[2]]


def check(job: Job, launch: Launch) -> tuple[list[str], str]:
    """Lines to print, with warnings for close cases, and the reason why the job cannot fit, empty if it can."""
    needs = estimate(job, launch)
    lines, refusals = report(needs), []
    for name, needed, available in shortages(needs):
        share = 1.0 if name == "disk" else SURE
        text = f"{name}: about {size(needed)} needed, {size(available)} available"
        if share * needed > available:
            refusals.append(text)
        else:
            lines.append(f"warning: {text}")
    if not refusals:
        return lines, ""
    hints = [f"run_dir={job.cfg.run_dir} is on that disk" for text in refusals if text.startswith("disk")]
    advice = "; ".join(hints + _advice(job, launch))
    return lines, f"does not fit: {'; '.join(refusals)}. {advice}"


def _fits(job: Job, launch: Launch) -> bool:
    memory = Footprint(job, launch).peak()
    return memory.host * launch.per_node <= launch.host_memory and memory.gpu <= launch.gpu_memory


def _advice(job: Job, launch: Launch) -> list[str]:
    """For each setting, the first value with which the memory suffices."""
    if _fits(job, launch):
        return []
    advice, unit = [], "GPUs" if launch.gpu_memory else "ranks, each on a node of its own"
    for power in range(13):
        world = 2**power
        per_node = min(world, launch.per_node) if launch.gpu_memory else 1
        if _fits(job, replace(launch, nodes=world // per_node, per_node=per_node)):
            advice.append(f"{world} {unit} would do")
            break
    calibration, sparsify = job.cfg.calibration, job.cfg.sparsify
    for fewer in (2**power for power in range(calibration.micro_batch.bit_length() - 1, -1, -1)):
        if fewer < calibration.micro_batch and _fits(_with(job, calibration=replace(calibration, micro_batch=fewer)), launch):
            advice.append(f"calibration.micro_batch={fewer} would do")
            break
    for part in (2, 4, 8, 16, 32) if sparsify.reads_grams else ():
        if _fits(_with(job, sparsify=replace(sparsify, gram_gib=sparsify.gram_gib / part)), launch):
            advice.append(f"sparsify.gram_gib={sparsify.gram_gib / part:g} would do")
            break
    return advice or [
        "no number of ranks, calibration.micro_batch or sparsify.gram_gib alone would do; lower calibration.samples"
    ]


def _with(job: Job, **changes) -> Job:
    return replace(job, cfg=replace(job.cfg, **changes))


def preflight(job: Job, ranks: Ranks, cluster: ClusterConfig | None = None) -> None:
    """Print the needs of `job` on this launch, or on `cluster`. All ranks call this together. Raises StunError on all of them
    if it cannot fit."""
    base = max(ranks.gather_objects(resident()))
    if cluster and cluster.nodes:
        launch = ranks.on_first(lambda: described(cluster, job.arch, base))
    else:
        launch = this_launch(ranks, job.arch, job.cfg, base)
    ranks.on_first(lambda: _print_estimate(job, launch, ranks))


def _print_estimate(job: Job, launch: Launch, ranks: Ranks) -> None:
    """Print the estimate. Raises StunError if the job cannot fit."""
    lines, refusal = check(job, launch)
    for line in lines:
        ranks.log(line)
    if refusal:
        raise StunError(refusal)
