"""Search for the share of a target removed as whole experts, on a part of the calibration samples.

Every candidate tries every layer on the hidden states of its own pruned layers before it (stun.pruning.trials). What counts is
how far the model's predictions for the samples held out are from the dense model's.
"""

import math
from dataclasses import replace

import torch

from stun.config import StunError
from stun.model.architecture import Architecture
from stun.planning.budget import layer_quotas
from stun.planning.job import Job
from stun.planning.make import make_plan
from stun.planning.plan import Plan
from stun.pruning.trials import Passing, by_score, embedded, trial
from stun.runtime.determinism import steady
from stun.runtime.ranks import Ranks
from stun.runtime.units import count
from stun.stream.embeddings import outside
from stun.stream.layer_stream import LayerStream, States, even_owners
from stun.stream.progress import Progress

_LOGITS = 2**26  # computed at once


def search_fraction(job: Job, ranks: Ranks) -> dict[float, float]:
    """Error by fraction: the mean of KL(dense || pruned), in nats a token, on held-out samples.

    All ranks call this together, after the job's statistics are taken. Raises StunError if no fraction can be met.
    """
    arch = job.arch
    plans = ranks.on_first(lambda: _candidates(job))
    quotas = {f: layer_quotas(job.sizes, plan) for f, plan in plans.items()}
    dense = embedded(job, ranks)
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
        dense = dense.through(stream, layer)
        for fraction, plan in plans.items():
            before = Passing(replace(pruned[fraction].fit, dense=dense.fit), pruned[fraction].held)
            pruned[fraction] = trial(job, stream, layer, plan, quotas[fraction][index], before)
        progress.layer(layer, count(len(plans), "fraction"))
    progress.close()
    with outside(arch, ranks), steady(ranks.device, ranks.workers):
        return {fraction: _divergence(arch, own.held, dense.held, ranks) for fraction, own in pruned.items()}


def _candidates(job: Job) -> dict[float, Plan]:
    """Plans by fraction, for those that protected experts allow."""
    plans, refused = {}, None
    for fraction in job.fractions:
        try:
            plans[fraction] = make_plan(by_score(job).with_fraction(fraction), job.statistics)
        except StunError as error:
            refused = error  # other splits may be possible
    if not plans:
        raise refused
    return plans


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
