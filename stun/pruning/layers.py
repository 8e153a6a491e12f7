"""The second stream: experts are dropped, inputs measured, masks made, states propagated, layers written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from stun.config import StunError
from stun.planning.budget import layer_quotas
from stun.planning.job import Job
from stun.planning.plan import LayerPlan, Plan, cluster_owners
from stun.pruning.mask import Masked, mask_layer
from stun.pruning.representatives import keep_representatives
from stun.pruning.shards import own_tensors
from stun.run.layer_metrics import WeightPowers, nonzero_by_kind
from stun.run.ledger import REPEAT, part_name
from stun.run.recorder import Recorder
from stun.runtime.ranks import Ranks
from stun.sparsify.saliency import Saliency
from stun.stream.layer_stream import LayerStream, States
from stun.stream.progress import Progress


@dataclass
class PruneResult:
    """What the second stream did: surviving experts by layer, non-zero weights of the decoder layers as written, experts that
    saw no token, the entries of all files of the layers, in their order, and those of every layer."""

    kept: list[list[int]]
    nonzero: int
    unseen: int
    files: list[dict]
    layers: list[list[dict]]

    @classmethod
    def of(cls, finished: list[list[dict]], decoder_layers: int) -> PruneResult:
        """From the entries of all layers."""
        counted = finished[:decoder_layers]
        return cls(
            [entries[0]["kept"] for entries in finished],
            sum(count for entries in counted for entry in entries for count in entry["nonzero"].values()),
            sum(entries[0]["unseen"] for entries in counted),
            [entry for entries in finished for entry in entries],
            finished,
        )


def _check_kept(finished: list[list[dict]], plans: list[LayerPlan], recorder: Recorder) -> None:
    """Raise StunError where the finished layers are not those of the plan."""
    folder = recorder.ledger.folder
    if len(finished) > len(plans):
        raise StunError(f"{folder}: has entries of {len(finished)} layers, the plan {len(plans)}; {REPEAT}")
    for number, (entries, plan) in enumerate(zip(finished, plans, strict=False)):
        for kept in (entry["kept"] for entry in entries):
            chosen = [len(set(kept).intersection(cluster)) for cluster in plan.clusters]
            if len(kept) != len(chosen) or set(chosen) - {1} or (plan.kept and kept != plan.kept):
                raise StunError(f"{folder}: layer {number}: kept: {kept}: the plan has other clusters; {REPEAT}")


def prune_layers(
    job: Job,
    plan: Plan,
    states: States | None,
    ranks: Ranks,
    recorder: Recorder,
    write: Callable[[str, dict[str, torch.Tensor]], dict],
) -> PruneResult:
    """Every layer pruned and written, on the hidden states that the already pruned layers before it produce; then the experts of
    multi-token-prediction heads, which lose experts but no single weights.

    `write(name, tensors)` puts a file of this rank on disk and returns its entry for the `recorder`, which knows the layers that
    are finished already. Without `states` nothing is measured: the plan removes no single weights, or by their size alone.
    """
    arch, plans, quotas = job.arch, [*plan.layers, *plan.mtp], layer_quotas(job.sizes, plan)
    layouts, finished = [*arch.layers, *arch.mtp], recorder.finished()
    owners = [cluster_owners(plan, ranks.world) for plan in plans]
    stream = LayerStream(arch, ranks, layouts, owners, len(finished))
    progress = Progress("prune", len(layouts), ranks, len(finished), step=len(arch.layers))
    _check_kept(finished, plans, recorder)
    states = recorder.restore(finished, states) if states is not None else None
    for layer in stream:
        index, start = layer.layout.index, time.perf_counter()
        ranks.doing = f"prune layer {index}"
        ranks.meter.enter("choose")
        powers = WeightPowers(stream, layer)
        kept = keep_representatives(stream, layer, plans[index])
        powers.experts_left(is_changed=plans[index].mean or len(kept) < plans[index].experts)
        masked = Masked(0, Saliency())
        if not layer.layout.is_mtp:
            if states is not None:
                stream.build(layer)
            masked = mask_layer(stream, layer, states, quotas[index], job.cfg.sparsify)
            if states is not None and index + 1 < len(arch.layers):  # nothing follows the last one
                ranks.meter.enter("propagate")
                stream.build(layer)
                states = stream.run(layer, states)
        powers.weights_left()
        tensors = own_tensors(stream, layer)
        nonzero = nonzero_by_kind(layer.layout, tensors, ranks.workers)
        layer.seconds["compute"] = time.perf_counter() - start
        entry = {
            "kept": kept,
            "unseen": masked.unseen,
            "seconds": dict(layer.seconds),
            "peak_bytes": ranks.lap_memory(),
            "nonzero": nonzero,
            "powers": powers.stages,
            "saliency": masked.saliency.to_json(),
        }
        name = f"layer-{part_name(index, ranks.rank, ranks.world)}.safetensors"
        ranks.meter.enter("write wait")
        layer.seconds["write"] = recorder.wait()
        left = int(ranks.sum_integers(torch.tensor([sum(nonzero.values())], device=ranks.device)))
        share = left / arch.parameters_of(layer.layout)
        told = f"experts {plans[index].experts}->{len(kept)} | nonzero {share:.3f}"
        progress.layer(layer, told, experts_kept=len(kept), nonzero_share=share)
        recorder.layer(index, states, entry, partial(write, name, tensors))
    recorder.close()
    progress.close()
    return PruneResult.of(recorder.finished(), len(arch.layers))
