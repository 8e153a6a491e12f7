"""How much of a target should leave as whole experts: the split with the least error on held-out calibration samples.

One stream over the dense model serves all candidates. Each candidate prunes every layer on the hidden states that its own pruned
layers before it produce, as the real run does, and takes along samples that were not used for pruning; the error is how far
these are from the dense model's after the last layer. A cluster is represented by its member of most worth here, whatever the run
itself will do.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from stun.config import Representative, SparsifyConfig, StunError
from stun.data import Samples
from stun.planning.budget import LayerQuota, layer_quotas
from stun.planning.job import HELD_OUT, Job
from stun.planning.make import make_plan
from stun.planning.plan import Plan
from stun.pruning.mask import mask_layer
from stun.runtime.ranks import Ranks
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream, States, embed, even_owners
from stun.stream.progress import Progress


def search_fraction(job: Job, ranks: Ranks) -> dict[float, float]:
    """The error at each of the job's fractions: ||Y' - Y||^2 / ||Y||^2, with Y the dense last layer's output and Y' the pruned
    one's. All ranks call this together; the job's statistics are there."""
    cfg, arch = job.cfg, job.arch
    plans = ranks.on_first(lambda: _candidates(job))
    quotas = {f: layer_quotas(job.sizes, plan) for f, plan in plans.items()}
    size, read = cfg.calibration.micro_batch, arch.source.read
    states, held = (embed(arch, ranks, part.batches(size), read) for part in _split(job.samples))
    owners = [even_owners(layout, ranks.world) if layout.experts else [] for layout in arch.layers]
    stream, progress = LayerStream(arch, ranks, arch.layers, owners), Progress("search", len(arch.layers), ranks)
    own = {fraction: (states, held) for fraction in plans}
    for layer in stream:
        ranks.doing = f"search layer {layer.layout.index}"
        ranks.meter.enter("propagate")
        stream.build(layer)
        held = stream.run(layer, held)
        for fraction, plan in plans.items():
            kept = plan.layers[layer.layout.index].kept
            quota = quotas[fraction][layer.layout.index]
            own[fraction] = _through(stream, layer, kept, quota, cfg.sparsify, own[fraction])
        progress.layer(layer, f"{len(plans)} fractions")
    progress.close()
    return {fraction: _relative_error(pruned, held, ranks) for fraction, (_, pruned) in own.items()}


def _candidates(job: Job) -> dict[float, Plan]:
    """A plan, its representatives known without looking at weights, for each fraction that protected experts allow."""
    plans, refused = {}, None
    experts = replace(job.cfg.experts, representative=Representative.score, kappa=0)
    by_score = replace(job, cfg=replace(job.cfg, experts=experts))
    for fraction in job.fractions:
        try:
            plans[fraction] = make_plan(by_score.with_fraction(fraction), job.statistics)
        except StunError as error:
            refused = error  # this split cannot be; the others may
    if not plans:
        raise refused
    return plans


def _split(samples: Samples) -> tuple[Samples, Samples]:
    """The samples without the last eighth of every source, and these."""
    parts = list(zip(samples.sources, samples.tokens_ST.split(list(samples.sources.values())), strict=True))
    cuts = {name: len(part) - len(part) // HELD_OUT for name, part in parts}
    first = Samples(torch.cat([part[: cuts[name]] for name, part in parts]), cuts)
    last = Samples(torch.cat([part[cuts[name] :] for name, part in parts]), {n: len(part) - cuts[n] for n, part in parts})
    return first, last


def _through(
    stream: LayerStream, layer: Layer, kept: list[int], quota: LayerQuota, how: SparsifyConfig, both: tuple[States, States]
) -> tuple[States, States]:
    """The states and the held-out ones after a pruned copy of the layer, from `both` before it."""
    states, held = both
    own = Layer(
        layer.layout,
        {name: tensor.clone() for name, tensor in layer.dense.items()},
        {e: {part: t.clone() for part, t in layer.experts[e].items()} for e in kept if e in layer.experts},
        {},
        list(layer.kept),
        list(layer.owner),
    )
    stream.keep(own, kept)
    stream.build(own)
    mask_layer(stream, own, states, quota, how)
    stream.build(own)
    after = stream.run(own, states), stream.run(own, held)
    own.release()
    return after


def _relative_error(pruned: States, dense: States, ranks: Ranks) -> float:
    """||Y' - Y||^2 / ||Y||^2 over all ranks; a sum per token, and then exactly, so that no order matters."""
    pairs = list(zip(pruned.hidden, dense.hidden, strict=True))
    totals = []
    for part in ([a.float() - b.float() for a, b in pairs], [b.float() for _, b in pairs]):
        own = [value for hidden in part for value in hidden.square().sum(-1).flatten().tolist()]
        totals.append(math.fsum(value for values in ranks.gather_objects(own) for value in values))
    return totals[0] / totals[1] if totals[1] else 0.0
