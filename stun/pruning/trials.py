"""Trials of a layer: pruned copies of it, on a part of the calibration samples, as the run itself would prune it.

One stream over the dense model serves all trials. A trial prunes, refits and runs its copy of a layer on one sample in `SHARE`;
as many that are held out pass through the same copy. Clusters keep their member with the best score.
"""

from dataclasses import dataclass, replace

import torch
from torch.utils._pytree import tree_map

from stun.config import Representative
from stun.data.samples import Samples
from stun.planning.budget import LayerQuota
from stun.planning.job import SHARE, Job
from stun.planning.plan import Plan
from stun.pruning.joint_refit import HELD_OUT
from stun.pruning.layers import change_weights
from stun.pruning.rounding import rounding_of
from stun.runtime.ranks import Ranks
from stun.sparsify.joint_refit import FEW_STEPS
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream, States, embed


@dataclass
class Passing:
    """Hidden states that pass through the layers: of the samples that layers are pruned on, and of those held out."""

    fit: States
    held: States

    def through(self, stream: LayerStream, layer: Layer) -> "Passing":
        """Hidden states after a built layer."""
        return Passing(stream.run(layer, self.fit), stream.run(layer, self.held))


def by_score(job: Job) -> Job:
    """The job with the member of the best score kept of every cluster, whatever the run itself is configured to do: a choice that
    needs no weights."""
    return replace(job, cfg=replace(job.cfg, experts=replace(job.cfg.experts, representative=Representative.score, kappa=0)))


def embedded(job: Job, ranks: Ranks) -> Passing:
    """Hidden states of both parts of the job's samples before the first layer."""
    parts = (part.batches(_micro_batch(job, part)) for part in _split(job.samples))
    return Passing(*(embed(job.arch, ranks, batches, job.arch.source.read) for batches in parts))


def _split(samples: Samples) -> tuple[Samples, Samples]:
    """One sample in `SHARE` of every source to prune on, and as many that are held out."""
    parts = list(zip(samples.sources, samples.tokens_ST.split(list(samples.sources.values())), strict=True))
    chosen = [[(name, part[first::SHARE]) for name, part in parts] for first in (0, SHARE // 2)]
    fit, held = (Samples(torch.cat([p for _, p in own]), {name: len(p) for name, p in own}) for own in chosen)
    return fit, held


def _micro_batch(job: Job, samples: Samples) -> int:
    """Samples of a micro-batch: so few that the joint refit can hold one in `HELD_OUT` of them out."""
    return max(1, min(job.cfg.calibration.micro_batch, len(samples.tokens_ST) // HELD_OUT))


def trial(job: Job, stream: LayerStream, layer: Layer, plan: Plan, quota: LayerQuota, before: Passing) -> Passing:
    """What comes out of a pruned copy of the layer, changed as the run would do it. The dense layer itself serves the next trial
    too; `before.fit.dense` is what it makes of the same tokens."""
    kept = plan.layers[layer.layout.index].kept
    experts = {expert: parts for expert, parts in layer.experts.items() if expert in kept}
    copy = replace(layer, dense=tree_map(torch.clone, layer.dense), experts=tree_map(torch.clone, experts), unused={})
    stream.keep(copy, kept)
    rounding = rounding_of(job, plan, stream)
    _, fit = change_weights(job, rounding, stream, copy, quota, before.fit, FEW_STEPS)
    stream.build(copy)
    after = Passing(fit, stream.run(copy, before.held))
    copy.release()
    return after
