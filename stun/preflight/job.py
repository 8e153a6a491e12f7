"""Estimate of a run before it starts (tokens, bytes, memory, disk space, least time), and whether the launch has that much.

Reads headers, the configuration and a sample of the disk; the calibration text was read when the job was resolved.
"""

from dataclasses import replace

from stun.config import ExpertsMethod, StunError
from stun.model import runtimes
from stun.planning.budget import model_bytes
from stun.planning.counts import SERVED
from stun.planning.job import TRIED, Job
from stun.preflight.config import ClusterConfig
from stun.preflight.hardware import Launch, described, disk_free, gpu_base, resident, this_launch
from stun.preflight.memory import Footprint
from stun.preflight.time import durations
from stun.preflight.traffic import bytes_read, existing_bytes, snapshots_on_disk, statistics_bytes
from stun.runtime.ranks import Ranks
from stun.runtime.units import count, duration, size

SURE = 0.85  # refuse if less than this share of the estimate is available: estimates of memory are within 15 %
_ZEROS = (
    "zeros among the weights save no memory and no time in today's runtimes; fewer experts do (experts.drop, experts.keep, fit)"
)


class Estimate:
    """Needs of one run on one launch. In bytes: `read` by stream and rank, `written` of the model, `snapshots` of hidden states
    over the whole run, `memory` of a rank, `host` of a node, `statistics`, `disk` beside the files that a run left, `free` on
    disk. `durations` are seconds by stream."""

    def __init__(self, job: Job, launch: Launch):
        cfg, arch, streams, layers, footprint = job.cfg, job.arch, job.streams, len(job.arch.layers), Footprint(job, launch)
        self.job, self.launch, self.footprint = job, launch, footprint
        self.tokens = cfg.calibration.samples * cfg.calibration.length
        states = self.tokens * arch.token_width * footprint.dtype.itemsize
        recorded = sum(runs for name, runs in streams.items() if name not in TRIED)
        self.read = bytes_read(job, launch.world)
        self.written = model_bytes(arch, job.plan, cfg)
        self.snapshots = states * (layers - 1) * recorded
        self.memory = footprint.peak()
        self.host = self.memory.host * launch.per_node
        self.statistics = statistics_bytes(job) if "observe" in streams else 0
        most = sum(info.nbytes for info in arch.source.tensors.values()) if _may_grow(job) else self.written
        whole = most + states * snapshots_on_disk(layers, recorded) + self.statistics
        self.disk, self.free = max(0, whole - existing_bytes(cfg.run_dir)), disk_free(cfg.run_dir)
        self.durations = durations(footprint, self.read, self.written, self.snapshots)


def report(needs: Estimate) -> list[str]:
    """Lines to print."""
    job, launch, read = needs.job, needs.launch, {name: sum(ranks) for name, ranks in needs.read.items()}
    streams = ", ".join(f"{name} {size(total)}" for name, total in read.items())
    most_read = max(sum(ranks) for ranks in zip(*needs.read.values(), strict=True))
    libraries = f"with {size(gpu_base(launch.world))} for CUDA and its libraries, estimated"
    gpu = f"{size(needs.memory.gpu)} of {size(launch.gpu_memory)} of a GPU ({libraries}), " if launch.gpu_memory else ""
    host = f"{size(needs.host)} of {size(launch.host_memory)} of a node"
    rank = f"{size(needs.memory.host)} a rank, {size(launch.base)} at its start"
    least = {name: max(seconds.values()) for name, seconds in needs.durations.items()}
    bound = {name: max(seconds, key=seconds.__getitem__) for name, seconds in needs.durations.items()}
    times = ", ".join(f"{name} {duration(seconds)} to {bound[name]}" for name, seconds in least.items())
    kind = "data sheet" if launch.gpu_memory else "measured here"
    speeds = f"{launch.flops / 1e12:.3g} TFLOP/s a rank ({kind}), {size(launch.read)}/s a node"
    experts = sum(layout.num_experts for layout in job.arch.layers)
    tokens = f"{needs.tokens:,} calibration tokens" + (f" of {job.samples.available} in the text" if job.samples else "")
    lines = {
        "launch": f"{count(launch.world, 'rank')} on {count(launch.nodes, 'node')}, {launch.name}; {speeds}",
        "model": f"{count(len(job.arch.layers), 'layer')}, {count(experts, 'expert')}; {tokens}",
        "result": _result_line(job),
        "form": job.form_note,
        "loads": _loads_line(job),
        "method": _method_line(job, needs.footprint.passes + 1, needs.footprint.gram_bytes),
        "note": _ZEROS if job.plan.zeros else "",
        "reads": f"up to {size(sum(read.values()))} ({streams}), at most {size(most_read)} a rank",
        "writes": f"{size(needs.written)} of model, {size(needs.snapshots)} of hidden states",
        "memory": f"{gpu}{host} ({rank}); most at {needs.memory.phase}",
        "disk": f"{size(needs.disk)} needed, {size(needs.free)} free",
        "time": f"at least {duration(sum(least.values()))} ({times})",
    }
    return [f"{name:7s} {line}" for name, line in lines.items() if line]


def _result_line(job: Job) -> str:
    """Experts a layer and bytes, before and after."""
    before, after = sum(info.stored_bytes for info in job.arch.source.tensors.values()), model_bytes(job.arch, job.plan, job.cfg)
    if job.fractions:
        share = f"{job.fractions[0]:g} to {job.fractions[-1]:g} of the target as experts"
        return f"the search decides how much is removed: {share}; {size(before)} -> at most {size(after)} on disk"
    zeros = f", then {job.plan.zeros / job.plan.parameters:.1%} of the layers' parameters set to zero" if job.plan.zeros else ""
    least = "at least " if _may_grow(job) else ""
    return f"{_experts(job)}{zeros}; {size(before)} -> {least}{size(after)} on disk, about {size(SERVED * after)} to serve"


def _method_line(job: Job, forwards: int, grams: int) -> str:
    """The way experts and weights are chosen, and what that costs: `forwards` a layer in the second stream, `grams` bytes of Gram
    matrices a rank."""
    experts, sparsify = job.cfg.experts, job.cfg.sparsify
    way = f"by {experts.score.name}" if experts.method is ExpertsMethod.rank else f"by clusters ({experts.method.name})"
    if job.fractions:
        way = f"{way}, as many as the search finds best"
    way += ", from each layer as many as its losses say" if job.measures else ""
    chosen = "given by the plan" if job.is_given else way if any(job.drops) or job.fractions else "all kept"
    chosen += ", the others constants" if job.has_novices else ""
    chosen += ", those kept refitted together" if job.refits else ""
    if not job.plan.zeros:
        return f"experts {chosen}; no single weight is removed"
    refit = " with refit" if sparsify.reconstruct else ""
    cost = f"{count(forwards, 'forward')} a layer" + (f", {size(grams)} of Gram matrices a rank" if grams else "")
    quick = "; experiment=quick: Wanda, one forward a layer and no Gram matrices" if grams else ""
    return f"experts {chosen}; weights by {sparsify.method.name}{refit}: {cost}{quick}"


def _experts(job: Job) -> str:
    """`128 -> 96 experts a layer`; where layers may differ, their mean."""
    layers = [(layer.num_experts, layer.num_experts - drop) for layer, drop in zip(job.arch.layers, job.drops, strict=True)]
    moe = [pair for pair in layers if pair[0]]
    before, after = (sum(numbers) / len(moe) for numbers in zip(*moe, strict=True))
    about = "" if after == int(after) and not _may_differ(job) else "on average "
    return f"{before:g} -> {about}{after:.4g} experts a layer"


def _may_differ(job: Job) -> bool:
    removes = any(job.drops) or bool(job.fractions)
    is_open = not job.is_given and job.cfg.experts.may_differ and removes
    return is_open or len({drop for layer, drop in zip(job.arch.layers, job.drops, strict=True) if layer.experts}) > 1


def _may_grow(job: Job) -> bool:
    """Whether padding may make the files larger than the stand-in for the plan says: up to the size of the source."""
    return job.is_padded and _may_differ(job) and not job.is_given


def _loads_line(job: Job) -> str:
    """Runtimes that load the result."""
    kept = [layer.num_experts - drop for layer, drop in zip(job.arch.layers, job.drops, strict=True)]
    if _may_differ(job) and job.is_padded:
        return "what loads the original: experts of zeros fill every layer up to the most that one keeps"
    is_uneven = _may_differ(job) and not job.has_novices
    arch, novices = job.arch, job.has_novices
    loads = runtimes.uneven(arch.class_name) if is_uneven else runtimes.runtimes(arch.class_name, kept, novices, arch.is_grouped)
    return f"transformers: {loads['transformers']}; vLLM: {loads['vLLM']}"


def check(job: Job, launch: Launch) -> tuple[list[str], str]:
    """Lines to print, with warnings for close cases, and the reason why the job cannot fit, empty if it can."""
    needs = Estimate(job, launch)
    lines, refusals, hints = report(needs), [], []
    for name, share, needed, available in (
        ("disk", 1.0, needs.disk, needs.free),
        ("host memory of a node", SURE, needs.host, launch.host_memory),
        ("GPU memory of a rank", SURE, needs.memory.gpu, launch.gpu_memory),
    ):
        text = f"{name}: about {size(needed)} needed, {size(available)} available"
        if share * needed > available:
            refusals.append(text)
            hints += [f"run_dir={job.cfg.run_dir} is on that disk"] if name == "disk" else []
        elif needed > available:
            lines.append(f"warning: {text}")
    if not refusals:
        return lines, ""
    return lines, f"does not fit: {'; '.join(refusals)}. {'; '.join(hints + _advice(job, launch))}"


def _fits(job: Job, launch: Launch) -> bool:
    memory = Footprint(job, launch).peak()
    return memory.host * launch.per_node <= launch.host_memory and memory.gpu <= launch.gpu_memory


def _advice(job: Job, launch: Launch) -> list[str]:
    """For each setting, the first value with which the memory suffices."""
    if _fits(job, launch):
        return []

    def spread(world: int) -> Launch:
        per_node = min(world, launch.per_node) if launch.gpu_memory else 1
        return replace(launch, nodes=world // per_node, per_node=per_node)

    def fits(**changes) -> bool:
        return _fits(replace(job, cfg=replace(job.cfg, **changes)), launch)

    calibration = job.cfg.calibration
    batches = [2**power for power in reversed(range((calibration.micro_batch - 1).bit_length()))]
    unit = "GPUs" if launch.gpu_memory else "ranks, each on a node of its own"
    found = {
        f"{{}} {unit}": next((n for n in (2**power for power in range(13)) if _fits(job, spread(n))), 0),
        "experts.refit={}": "false" if job.refits and fits(experts=replace(job.cfg.experts, refit=False)) else "",
        "calibration.micro_batch={}": next((n for n in batches if fits(calibration=replace(calibration, micro_batch=n))), 0),
    }
    advice = [f"{text.format(value)} would do" for text, value in found.items() if value]
    return advice or ["no number of ranks or calibration.micro_batch alone would do; lower calibration.samples"]


def fitting_grams(job: Job, launch: Launch) -> float:
    """Most GiB of Gram matrices, `sparsify.gram_gib` or a part of it, with which the job fits; all of it if none does. The run's
    result does not depend on it."""
    sparsify = job.cfg.sparsify
    parts = [sparsify.gram_gib / part for part in (1, 2, 4, 8, 16, 32)] if sparsify.reads_grams else []
    return next((gib for gib in parts if _fits(_with_grams(job, gib), launch)), sparsify.gram_gib)


def _with_grams(job: Job, gib: float) -> Job:
    return replace(job, cfg=replace(job.cfg, sparsify=replace(job.cfg.sparsify, gram_gib=gib)))


def preflight(job: Job, ranks: Ranks, cluster: ClusterConfig | None = None) -> Job:
    """Print the needs of `job` on this launch, or on `cluster`; returns the job with the Gram matrices that fit there. All ranks
    call this together. Raises StunError on all of them if it cannot fit."""
    base = max(ranks.gather_objects(resident()))
    if cluster and cluster.nodes:
        launch = ranks.on_first(lambda: described(cluster, job.arch, base))
    else:
        launch = this_launch(ranks, job.arch, job.cfg, base)
    job = _with_grams(job, ranks.on_first(lambda: fitting_grams(job, launch)))
    ranks.on_first(lambda: _print_estimate(job, launch, ranks))
    return job


def _print_estimate(job: Job, launch: Launch, ranks: Ranks) -> None:
    """Print the estimate. Raises StunError if the job cannot fit."""
    lines, refusal = check(job, launch)
    for line in lines:
        ranks.log(line)
    if refusal:
        raise StunError(refusal)
