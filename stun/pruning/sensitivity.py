"""Sensitivity of the layers: what their outputs lose if some of their experts are removed, measured by trials.

Each layer is tried alone, on the hidden states of the dense model, and without a single weight removed: the allocation
(stun.planning.allocation) adds the losses of all layers up.
"""

import math
from dataclasses import replace

import torch

from stun.planning.allocation import Losses
from stun.planning.budget import layer_quotas
from stun.planning.job import Job
from stun.planning.make import make_plan, trial_drops
from stun.pruning.trials import Passing, embedded, trial
from stun.runtime.ranks import Ranks
from stun.runtime.units import count
from stun.stream.layer_stream import LayerStream, States, even_owners
from stun.stream.progress import Progress


def measure_losses(job: Job, ranks: Ranks) -> Losses:
    """Losses of every layer at the numbers of `trial_drops`: the mean over held-out tokens of |pruned - dense|^2 / |dense|^2, of the
    hidden states after the layer, which the next layer's norm divides by their size too.

    All ranks call this together, after the job's statistics are taken. Raises StunError as `make_plan` does.
    """
    arch, trials = job.arch, ranks.on_first(lambda: trial_drops(job, job.statistics))
    plans = ranks.on_first(lambda: [replace(make_plan(job, job.statistics, drops), zeros=0) for drops in trials])
    quotas = [layer_quotas(job.sizes, plan) for plan in plans]
    stream = LayerStream(arch, ranks, arch.layers, [even_owners(layout, ranks.world) for layout in arch.layers])
    progress, losses = Progress("budget", len(arch.layers), ranks), [{} for _ in arch.layers]
    progress.is_kept = False
    ranks.log(f"budget: {count(len(plans), 'trial')} a layer in one stream; a launch that is interrupted in it repeats it")
    dense = embedded(job, ranks)
    for layer in stream:
        index = layer.layout.index
        ranks.doing = f"budget layer {index}"
        ranks.meter.enter("propagate")
        stream.build(layer)
        after = dense.through(stream, layer)
        for drops, plan, quota in zip(trials, plans, quotas, strict=True):
            if drops[index]:
                before = Passing(replace(dense.fit, dense=after.fit), dense.held)
                tried = trial(job, stream, layer, plan, quota[index], before)
                losses[index][drops[index]] = _loss(tried.held, after.held, ranks)
        dense = after
        progress.layer(layer, count(len(plans), "trial"))
    progress.close()
    return losses


def _loss(pruned: States, dense: States, ranks: Ranks) -> float:
    """Mean of |pruned - dense|^2 / |dense|^2 over all ranks' tokens. The sum is exact, so that their order is free."""
    mine = []
    for pruned_BTD, dense_BTD in zip(pruned.hidden, dense.hidden, strict=True):
        pruned_ND, dense_ND = (hidden_BTD.float().flatten(0, -2) for hidden_BTD in (pruned_BTD, dense_BTD))
        error_N, size_N = (rows_ND.square().sum(-1) for rows_ND in (pruned_ND - dense_ND, dense_ND))
        mine += torch.where(size_N > 0, error_N / size_N, 0).tolist()
    everywhere = [number for own in ranks.gather_objects(mine) for number in own]
    return math.fsum(everywhere) / len(everywhere)
