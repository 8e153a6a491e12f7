"""Search for the share of a target removed as whole experts, on a part of the calibration samples.

One stream over the dense model serves all candidates. Each candidate prunes, refits and runs every layer as the real run does, on
the hidden states of its own pruned layers before it, of one sample in `SHARE`. As many held-out samples pass through the same
layers. What counts is how far the model's predictions for them are from the dense model's. Clusters keep their member with the
best score here, whatever the run itself is configured to do.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch.utils._pytree import tree_map

from stun.config import Representative, StunError
from stun.data.samples import Samples
from stun.model.architecture import Architecture
from stun.planning.budget import LayerQuota, layer_quotas
from stun.planning.job import SHARE, Job
from stun.planning.make import make_plan
from stun.planning.plan import Plan
from stun.pruning.joint_refit import HELD_OUT
from stun.pruning.layers import change_weights
from stun.pruning.rounding import rounding_of
from stun.runtime.determinism import steady
from stun.runtime.ranks import Ranks
from stun.runtime.units import count
from stun.sparsify.joint_refit import FEW_STEPS
from stun.stream.embeddings import outside
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream, States, embed, even_owners
from stun.stream.progress import Progress

_LOGITS = 2**26  # computed at once


@dataclass
class _Passing:
    """Hidden states that pass through the layers: of the samples that layers are pruned on, and of those held out."""

    fit: States
    held: States


def search_fraction(job: Job, ranks: Ranks) -> dict[float, float]:
    """Error by fraction: the mean of KL(dense || pruned), in nats a token, on held-out samples.

    All ranks call this together, after the job's statistics are taken. Raises StunError if no fraction can be met.
    """
    arch, read = job.arch, job.arch.source.read
    plans = ranks.on_first(lambda: _candidates(job))
    quotas = {f: layer_quotas(job.sizes, plan) for f, plan in plans.items()}
    dense = _Passing(*(embed(arch, ranks, part.batches(_micro_batch(job, part)), read) for part in _split(job.samples)))
    owners = [even_owners(layout, ranks.world) for layout in arch.layers]
    stream, progress = LayerStream(arch, ranks, arch.layers, owners), Progress("search", len(arch.layers), ranks)
    progress.is_kept = False
    ranks.log(f"search: {count(len(plans), 'split')} in one stream; a launch that is interrupted in it repeats it")
    pruned = dict.fromkeys(plans, dense)
    for layer in stream:
        index = layer.layout.index
        ranks.doing = f"search layer {index}"
        ranks.meter.enter("propagate")
        stream.build(layer)
        dense = _Passing(stream.run(layer, dense.fit), stream.run(layer, dense.held))
        for fraction, plan in plans.items():
            before = _Passing(replace(pruned[fraction].fit, dense=dense.fit), pruned[fraction].held)
            pruned[fraction] = _through(job, stream, layer, plan, quotas[fraction][index], before)
        progress.layer(layer, count(len(plans), "fraction"))
    progress.close()
    with outside(arch, ranks), steady(ranks.device, stream.dtype, ranks.workers):
        return {fraction: _divergence(arch, own.held, dense.held, ranks) for fraction, own in pruned.items()}


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
    """One sample in `SHARE` of every source to prune on, and as many that are held out."""
    parts = list(zip(samples.sources, samples.tokens_ST.split(list(samples.sources.values())), strict=True))
    chosen = [[(name, part[first::SHARE]) for name, part in parts] for first in (0, SHARE // 2)]
    fit, held = (Samples(torch.cat([p for _, p in own]), {name: len(p) for name, p in own}) for own in chosen)
    return fit, held


def _micro_batch(job: Job, samples: Samples) -> int:
    """Samples of a micro-batch: so few that the joint refit can hold one in `HELD_OUT` of them out."""
    return max(1, min(job.cfg.calibration.micro_batch, len(samples.tokens_ST) // HELD_OUT))


def _through(job: Job, stream: LayerStream, layer: Layer, plan: Plan, quota: LayerQuota, before: _Passing) -> _Passing:
    """What comes out of a pruned copy of the layer, changed as the run would do it. The dense layer itself serves the next
    candidate too."""
    kept = plan.layers[layer.layout.index].kept
    experts = {expert: parts for expert, parts in layer.experts.items() if expert in kept}
    copy = replace(layer, dense=tree_map(torch.clone, layer.dense), experts=tree_map(torch.clone, experts), unused={})
    stream.keep(copy, kept)
    rounding = rounding_of(job, plan, stream)
    _, fit = change_weights(job, rounding, stream, copy, quota, before.fit, FEW_STEPS)
    stream.build(copy)
    after = _Passing(fit, stream.run(copy, before.held))
    copy.release()
    return after


@torch.no_grad()
def _divergence(arch: Architecture, pruned: States, dense: States, ranks: Ranks) -> float:
    """Mean of KL(dense || pruned) over all ranks' tokens, in nats. The sum over tokens is exact, so that their order is free."""
    mine, rows = [], max(1, _LOGITS // arch.config.vocab_size)
    for pair in zip(dense.hidden, pruned.hidden, strict=True):
        for parts in zip(*(hidden_BTD.flatten(0, 1).split(rows) for hidden_BTD in pair), strict=True):
            dense_NV, pruned_NV = (torch.log_softmax(arch.leave(part_ND).float(), -1) for part_ND in parts)
            mine += (dense_NV.exp() * (dense_NV - pruned_NV)).sum(-1).tolist()
    everywhere = [number for own in ranks.gather_objects(mine) for number in own]
    return math.fsum(everywhere) / len(everywhere)
