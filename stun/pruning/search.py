"""Search for the share of a target removed as whole experts: the one with the least error on held-out calibration samples.

One stream over the dense model serves all candidates. Each candidate prunes every layer on the hidden states of its own pruned
layers before it, as the real run does. The held-out samples pass through the same layers; the error is the distance of their
hidden states from the dense model's after the last layer. Clusters keep their member with the best score here, whatever the run
itself is configured to do.
"""

import math
from dataclasses import replace

import torch
from torch.utils._pytree import tree_map

from stun.config import Representative, SparsifyConfig, StunError
from stun.data.samples import Samples
from stun.planning.budget import LayerQuota, layer_quotas
from stun.planning.job import HELD_OUT, Job
from stun.planning.make import make_plan
from stun.planning.plan import Plan
from stun.pruning.mask import mask_layer
from stun.runtime.ranks import Ranks
from stun.runtime.units import count
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream, States, embed, even_owners
from stun.stream.progress import Progress


def search_fraction(job: Job, ranks: Ranks) -> dict[float, float]:
    """Error by fraction: ||Y' - Y||^2 / ||Y||^2, with Y the output of the dense last layer and Y' that of the pruned one.

    All ranks call this together, after the job's statistics are taken. Raises StunError if no fraction can be met.
    """
    cfg, arch = job.cfg, job.arch
    plans = ranks.on_first(lambda: _candidates(job))
    quotas = {f: layer_quotas(job.sizes, plan) for f, plan in plans.items()}
    size, read = cfg.calibration.micro_batch, arch.source.read
    states, held = (embed(arch, ranks, part.batches(size), read) for part in _split(job.samples))
    owners = [even_owners(layout, ranks.world) for layout in arch.layers]
    stream, progress = LayerStream(arch, ranks, arch.layers, owners), Progress("search", len(arch.layers), ranks)
    progress.is_kept = False
    ranks.log(f"search: {count(len(plans), 'split')} in one stream; a launch that is interrupted in it repeats it")
    pruned = {fraction: (states, held) for fraction in plans}
    for layer in stream:
        ranks.doing = f"search layer {layer.layout.index}"
        ranks.meter.enter("propagate")
        stream.build(layer)
        held = stream.run(layer, held)
        for fraction, plan in plans.items():
            kept = plan.layers[layer.layout.index].kept
            quota = quotas[fraction][layer.layout.index]
            pruned[fraction] = _through(stream, layer, kept, quota, cfg.sparsify, pruned[fraction])
        progress.layer(layer, count(len(plans), "fraction"))
    progress.close()
    return {fraction: _relative_error(candidate, held, ranks) for fraction, (_, candidate) in pruned.items()}


def _candidates(job: Job) -> dict[float, Plan]:
    """Plans by fraction, for those that protected experts allow; representatives by score, which needs no weights."""
    plans, refused = {}, None
    experts = replace(job.cfg.experts, representative=Representative.score, kappa=0)
    by_score = replace(job, cfg=replace(job.cfg, experts=experts))
    for fraction in job.fractions:
        try:
            plans[fraction] = make_plan(by_score.with_fraction(fraction), job.statistics)
        except StunError as error:
            refused = error  # other splits may be possible
    if not plans:
        raise refused
    return plans


def _split(samples: Samples) -> tuple[Samples, Samples]:
    """Samples for pruning, and the held-out ones: the last eighth of every source."""
    parts = list(zip(samples.sources, samples.tokens_ST.split(list(samples.sources.values())), strict=True))
    cuts = {name: len(part) - len(part) // HELD_OUT for name, part in parts}
    first = Samples(torch.cat([part[: cuts[name]] for name, part in parts]), cuts)
    last = Samples(torch.cat([part[cuts[name] :] for name, part in parts]), {n: len(part) - cuts[n] for n, part in parts})
    return first, last


def _through(
    stream: LayerStream, layer: Layer, kept: list[int], quota: LayerQuota, config: SparsifyConfig, both: tuple[States, States]
) -> tuple[States, States]:
    """Prune a copy of the layer; returns the pruning and held-out states after it, from `both` before it."""
    states, held = both
    # A copy: the dense layer serves the next candidate too.
    experts = {expert: parts for expert, parts in layer.experts.items() if expert in kept}
    copy = replace(layer, dense=tree_map(torch.clone, layer.dense), experts=tree_map(torch.clone, experts), unused={})
    stream.keep(copy, kept)
    stream.build(copy)
    mask_layer(stream, copy, states, quota, config)
    stream.build(copy)
    after = stream.run(copy, states), stream.run(copy, held)
    copy.release()
    return after


def _relative_error(pruned: States, dense: States, ranks: Ranks) -> float:
    """||Y' - Y||^2 / ||Y||^2 over all ranks: summed per token, then exactly, so that the order of ranks does not matter."""
    pairs = list(zip(pruned.hidden, dense.hidden, strict=True))
    totals = []
    for part in ([a.float() - b.float() for a, b in pairs], [b.float() for _, b in pairs]):
        sums = [value for hidden in part for value in hidden.square().sum(-1).flatten().tolist()]
        totals.append(math.fsum(value for values in ranks.gather_objects(sums) for value in values))
    return totals[0] / totals[1] if totals[1] else 0.0
