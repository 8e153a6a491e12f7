"""Sensitivity of the layers: what their outputs lose if some of their experts are removed, measured by trials.

Each layer is tried alone, on the hidden states of the dense model, and without a single weight removed: the allocation
(stun.planning.allocation) adds the losses of all layers up. A loss is the squared error of the hidden states after the layer
beside their size, by which the next layer's norm divides them.
"""

import math
from dataclasses import replace
from pathlib import Path
from statistics import median

from stun.config import Dropped, StunError
from stun.files import write_json
from stun.planning.allocation import Losses
from stun.planning.budget import layer_quotas
from stun.planning.job import Job
from stun.planning.make import make_plan, trial_drops
from stun.pruning.trials import Passing, by_score, embedded, trial
from stun.runtime.ranks import Ranks
from stun.runtime.units import count
from stun.schema import SIZE, Leaf, load_record
from stun.statistics.store import Statistics
from stun.stream.layer_stream import LayerStream, States, even_owners
from stun.stream.progress import Progress

_REMOVED = Leaf("a whole number", lambda name: name.isdecimal() and len(name) < 10)


def losses(job: Job, file: Path, ranks: Ranks) -> Losses:
    """Losses in the file, or measured and written there, so that a launch that goes on has them. All ranks call this together,
    after the job's statistics are taken. Raises StunError if the file does not fit the job."""
    stats = job.statistics if job.reads_statistics else None
    total = sum((job.with_fraction(max(job.fractions)) if job.fractions else job).drops)
    job = _experts_alone(by_score(job))
    trials = ranks.on_first(lambda: trial_drops(job, stats, total))
    known = ranks.on_first(lambda: _read(file, trials) if file.is_file() else None)
    if known is None:
        known = _measured(job, stats, trials, ranks)
        ranks.on_first(lambda: write_json(file, {"losses": known}))
    return known


def _read(file: Path, trials: list[list[int]]) -> Losses:
    again = "remove the file to measure again"
    layers = load_record(file, {"losses": [{_REMOVED: SIZE}]}, again)["losses"]
    known = [{int(removed): loss for removed, loss in layer.items()} for layer in layers]
    wanted = [set(numbers) - {0} for numbers in zip(*trials, strict=True)]
    if [set(layer) for layer in known] != wanted:
        raise StunError(f"{file}: losses: they are those of other trials; {again}")
    return known


def _measured(job: Job, stats: Statistics | None, trials: list[list[int]], ranks: Ranks) -> Losses:
    """Losses of every layer in each of the trials, on held-out tokens. Raises StunError as `make_plan` does."""
    arch = job.arch
    plans = ranks.on_first(lambda: [make_plan(job, stats, drops) for drops in trials])
    quotas = [layer_quotas(job.sizes, plan) for plan in plans]
    stream = LayerStream(arch, ranks, arch.layers, [even_owners(layout, ranks.world) for layout in arch.layers])
    progress, found = Progress("budget", len(arch.layers), ranks), [{} for _ in arch.layers]
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
            if drops[index] and drops[index] not in found[index]:
                before = Passing(replace(dense.fit, dense=after.fit), dense.held)
                tried = trial(job, stream, layer, plan, quota[index], before)
                found[index][drops[index]] = _loss(tried.held, after.held, ranks)
        dense = after
        progress.layer(layer, count(len(plans), "trial"))
    progress.close()
    return found


def _experts_alone(job: Job) -> Job:
    """The job without a single weight to remove. What is lost beside novices is measured as if their tokens were rerouted."""
    experts = replace(job.cfg.experts, dropped=Dropped.reroute)
    sparsify = replace(job.cfg.sparsify, pattern="", ratios="uniform")
    return replace(job, cfg=replace(job.cfg, experts=experts, target=0.0, sparsify=sparsify))


def _loss(pruned: States, dense: States, ranks: Ranks) -> float:
    """Mean over all ranks' tokens of |pruned - dense|^2 / |dense|^2, or / the median of |dense|^2 for smaller tokens. So neither
    a few very large tokens nor very small ones decide. The sum is exact, so that the tokens' order is free."""
    mine: list[tuple[float, float]] = []
    for pair in zip(pruned.hidden, dense.hidden, strict=True):
        pruned_ND, dense_ND = (hidden_BTD.float().flatten(0, -2) for hidden_BTD in pair)
        error_N, size_N = (rows_ND.square().sum(-1).tolist() for rows_ND in (pruned_ND - dense_ND, dense_ND))
        mine += zip(error_N, size_N, strict=True)
    everywhere = [token for own in ranks.gather_objects(mine) for token in own]
    least = median(size for _, size in everywhere) or 1.0
    return math.fsum(error / max(size, least) for error, size in everywhere) / len(everywhere)
