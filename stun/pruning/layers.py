"""Second stream: removes experts and weights layer by layer, runs every pruned layer, and writes it."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from stun.checkpoint.writer import Tensors
from stun.config import StunError
from stun.planning.budget import LayerQuota, layer_quotas
from stun.planning.job import Job
from stun.planning.plan import LayerPlan, Plan, owners
from stun.pruning.joint_refit import refit_jointly
from stun.pruning.mask import Masking
from stun.pruning.padding import padded
from stun.pruning.representatives import keep_representatives
from stun.pruning.rounding import Rounding, rounding_of
from stun.pruning.shards import as_rounded, own_tensors
from stun.run.layer_metrics import WeightPowers, nonzero_by_kind
from stun.run.layer_records import left_by_refit
from stun.run.ledger import REPEAT, part_name
from stun.run.recorder import Recorder
from stun.runtime.ranks import Ranks
from stun.sparsify.joint_refit import STEPS
from stun.statistics.output_sums import OutputSums
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream, States
from stun.stream.progress import Progress


def _check_kept(finished: list[list[dict]], plans: list[LayerPlan], recorder: Recorder) -> None:
    """Raises StunError if the finished layers are not those of the plan."""
    folder = recorder.ledger.folder
    if len(finished) > len(plans):
        raise StunError(f"{folder}: has entries of {len(finished)} layers, the plan {len(plans)}; {REPEAT}")
    for number, (entries, plan) in enumerate(zip(finished, plans, strict=False)):
        for kept in (entry["kept"] for entry in entries):
            chosen = [len(set(kept).intersection(cluster)) for cluster in plan.clusters]
            if len(kept) != len(chosen) or set(chosen) - {1} or (plan.kept and kept != plan.kept):
                raise StunError(f"{folder}: layer {number}: kept: {kept}: the plan has other clusters; {REPEAT}")


def prune_layers(
    job: Job, plan: Plan, states: States | None, ranks: Ranks, recorder: Recorder, write: Callable[[str, Tensors, dict], dict]
) -> list[list[dict]]:
    """Prune and write every layer on the hidden states of the pruned layers before it, then the multi-token-prediction heads.
    Returns the ledger entries of every layer, by rank.

    `write(name, tensors, origins)` writes a file of this rank and returns its entry for the `recorder`, which knows the finished
    layers. `states` may be None if the plan removes no single weights, or by magnitude alone. All ranks call this together.
    """
    arch, plans = job.arch, [*plan.layers, *plan.mtp]
    quotas = [*layer_quotas(job.sizes, plan), *(LayerQuota({}, []) for _ in plan.mtp)]
    layouts, finished = [*arch.layers, *arch.mtp], recorder.finished()
    stream = LayerStream(arch, ranks, layouts, owners(plan, ranks.world, job.runs_dense), len(finished))
    pairs = zip(arch.layers, plan.layers, strict=True)
    refits = (job.refit_bytes(*pair, ranks.world, stream.dtype.itemsize) for pair in pairs)
    stream.reserved = max(refits) if job.refits else 0
    progress = Progress("prune", len(layouts), ranks, len(finished), step=len(arch.layers))
    _check_kept(finished, plans, recorder)
    rounding = rounding_of(job, plan, stream)
    states = recorder.restore(finished, states) if states is not None else None
    for layer in stream:
        index, start = layer.layout.index, time.perf_counter()
        ranks.doing = f"prune layer {index}"
        entry, states = _prune_layer(job, rounding, stream, layer, (plans[index], quotas[index]), states)
        nonzero = entry["nonzero"] or nonzero_by_kind(stream, layer)
        tensors, places = as_rounded(stream, layer, own_tensors(stream, layer))
        tensors = padded(stream, layer, tensors, plan.most) if job.is_padded else tensors
        layer.seconds["compute"] = time.perf_counter() - start
        entry |= {"seconds": dict(layer.seconds), "peak_bytes": ranks.lap_memory(), "nonzero": nonzero}
        name = f"layer-{part_name(index, ranks.rank, ranks.world)}.safetensors"
        ranks.meter.enter("write wait")
        layer.seconds["write"] = recorder.wait()
        left = f" | refit leaves {left_by_refit(entry['refit']):.3f} of the error" if entry["refit"] else ""
        experts = f"experts {plans[index].experts}->{len(layer.kept)}{left}"
        _show(progress, stream, layer, experts, sum(nonzero.values()))
        recorder.layer(index, states, entry, partial(write, name, tensors, places))
    recorder.close()
    progress.close()
    return recorder.finished()


def _prune_layer(
    job: Job,
    rounding: Rounding,
    stream: LayerStream,
    layer: Layer,
    wanted: tuple[LayerPlan, LayerQuota],
    states: States | None,
) -> tuple[dict, States | None]:
    """Remove experts and then weights in place, round what is kept, and run the layer. Returns measurements for the ledger's
    entry, and the states after the layer."""
    (plan, quota), constants_ED = wanted, None
    if job.runs_dense and not layer.layout.is_mtp:
        stream.ranks.meter.enter("dense")
        states, constants_ED = _through_dense(stream, layer, states, job.has_novices)
    stream.ranks.meter.enter("choose")
    powers = WeightPowers(stream, layer)
    kept = keep_representatives(stream, layer, plan, constants_ED)
    powers.experts_removed(is_changed=plan.mean or len(kept) < plan.experts)
    # No forward runs a prediction head.
    measured, states = change_weights(job, rounding, stream, layer, quota, None if layer.layout.is_mtp else states)
    powers.weights_removed()
    return {"kept": kept, "powers": powers.stages, **measured}, states


def change_weights(
    job: Job, rounding: Rounding, stream: LayerStream, layer: Layer, quota: LayerQuota, states: States | None, steps: int = STEPS
) -> tuple[dict, States | None]:
    """Remove the weights of the quota from a layer's experts that are kept, round and refit the others, in at most so many
    `steps`, and run the layer. Returns as `_prune_layer` does. Seven parameters: the search calls it as the run does, in fewer
    steps."""
    meter, is_last = stream.ranks.meter, layer.layout.index + 1 >= len(stream.arch.layers)
    is_refitted, refit = bool(job.refits and layer.layout.experts and states is not None), {}
    if states is not None:
        stream.build(layer)
    solved = partial(rounding.fit, layer, is_refitted)
    unseen, saliency = Masking(stream, layer, states, quota, job.cfg.sparsify, solved).run()
    nonzero = rounding.nonzero_before(layer)
    rounding.round(layer, (False,) if is_refitted else (False, True))
    if states is not None and (is_refitted or not is_last):
        stream.build(layer)
    if is_refitted:
        meter.enter("refit")
        refit = refit_jointly(stream, layer, states, states.dense.hidden, rounding, steps)
        rounding.round(layer, (True,))
        stream.build(layer)
    if states is not None and not is_last:  # nothing reads the last one's output
        meter.enter("propagate")
        states = stream.run(layer, states)
    return {"unseen": unseen, "saliency": saliency.to_json(), "refit": refit, "nonzero": nonzero}, states


def _through_dense(stream: LayerStream, layer: Layer, states: States, has_novices: bool) -> tuple[States, torch.Tensor | None]:
    """States with those of the dense model after a layer that is still whole, and the experts' best constants [E, D] if experts
    that are removed become novices."""
    stream.build(layer)
    sums = [OutputSums(stream, layer, [0] * states.total)] if has_novices and layer.kept else []
    dense = stream.run(layer, states.dense, *sums)
    return replace(states, dense=dense), next((taken.constants() for taken in sums), None)


def _show(progress: Progress, stream: LayerStream, layer: Layer, experts: str, nonzero: int) -> None:
    """Log a finished layer with its share of non-zero weights over all ranks; `nonzero` are those of this rank."""
    total = int(stream.ranks.sum_integers(torch.tensor([nonzero], device=stream.ranks.device)))
    share = total / stream.arch.parameters_of(layer.layout)
    progress.layer(layer, f"{experts} | nonzero {share:.3f}", experts_kept=len(layer.kept), nonzero_share=share)
