"""Result of a job in words, before it starts: experts a layer, bytes on disk and to serve, runtimes that load it, and the way."""

from stun.config import ExpertsMethod
from stun.model import runtimes
from stun.planning.budget import model_bytes
from stun.planning.counts import SERVED
from stun.planning.job import Job
from stun.runtime.units import count, size

ZEROS = (
    "zeros among the weights save no memory and no time in today's runtimes; fewer experts do (experts.drop, experts.keep, fit)"
)


def result_line(job: Job) -> str:
    """Experts a layer and bytes, before and after."""
    before, after = (
        sum(info.stored_bytes for info in job.arch.source.tensors.values()),
        model_bytes(job.arch, job.plan, job.cfg),
    )
    if job.fractions:
        share = f"{job.fractions[0]:g} to {job.fractions[-1]:g} of the target as experts"
        return f"the search decides how much is removed: {share}; {size(before)} -> at most {size(after)} on disk"
    zeros = f", then {job.plan.zeros / job.plan.parameters:.1%} of the layers' parameters set to zero" if job.plan.zeros else ""
    least = "at least " if may_grow(job) else ""
    return f"{_experts(job)}{zeros}; {size(before)} -> {least}{size(after)} on disk, about {size(SERVED * after)} to serve"


def method_line(job: Job, forwards: int, grams: int) -> str:
    """How experts and weights are chosen, and what that costs: `forwards` a layer in the second stream, `grams` bytes of Gram
    matrices a rank."""
    experts, sparsify = job.cfg.experts, job.cfg.sparsify
    way = f"by {experts.score.name}" if experts.method is ExpertsMethod.rank else f"by clusters ({experts.method.name})"
    if job.fractions:
        way = f"{way}, as many as the search finds best"
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


def may_grow(job: Job) -> bool:
    """Whether padding may make the files larger than the stand-in for the plan says: up to the size of the source."""
    return job.is_padded and _may_differ(job) and not job.is_given


def loads_line(job: Job) -> str:
    """Runtimes that load the result."""
    kept = [layer.num_experts - drop for layer, drop in zip(job.arch.layers, job.drops, strict=True)]
    if _may_differ(job) and job.is_padded:
        return "what loads the original: experts of zeros fill every layer up to the most that one keeps"
    is_uneven = _may_differ(job) and not job.has_novices
    arch, novices = job.arch, job.has_novices
    loads = runtimes.uneven(arch.class_name) if is_uneven else runtimes.runtimes(arch.class_name, kept, novices, arch.is_grouped)
    return f"transformers: {loads['transformers']}; vLLM: {loads['vLLM']}"
