"""The two streams over the decoder layers: `observe` (dense) and `prune_layers` (drop, measure, mask, propagate, write)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from stun.config import SparsifyConfig, StunError
from stun.model.architecture import Architecture
from stun.planning.budget import LayerQuota, quota_of
from stun.planning.experts.distances import router_distance
from stun.planning.plan import LayerPlan, nearest_member
from stun.pruning.mask import Masked, mask_layer
from stun.pruning.saliency import Saliency
from stun.pruning.shards import cluster_owners, own_tensors
from stun.run.layer_metrics import WeightPowers, expert_powers, nonzero_by_kind
from stun.run.ledger import REPEAT, part_name
from stun.run.recorder import Recorder
from stun.runtime.ranks import Ranks
from stun.statistics.accumulators import Agreement, CoActivation, OutputPowers, norms, weight_sums
from stun.statistics.outliers import OutlierCounter
from stun.stream.expert_parallel import Layer, Observer
from stun.stream.layer_stream import LayerStream, States, even_owners
from stun.stream.progress import Progress


class Watcher(Observer):
    """Collects selection statistics of one layer; `sources[m]` is the calibration source of micro-batch m."""

    def __init__(self, num_experts: int, sources: list[int], ranks: Ranks):
        shape = (max(sources, default=0) + 1, num_experts, ranks.device)
        self.sources, self.ranks = sources, ranks
        self.coactivation, self.agreement, self.powers = CoActivation(*shape), Agreement(*shape), OutputPowers(*shape)
        nobody_TK = torch.zeros(0, 1, dtype=torch.int64, device=ranks.device)
        self._nothing_EX = self.powers.of(nobody_TK, nobody_TK, nobody_TK)

    def routed(self, micro_batch, index_TK, weights_TK) -> None:
        self._routed = (self.sources[micro_batch], index_TK, weights_TK)
        self._product_TKK = weights_TK.new_empty(*index_TK.shape, index_TK.shape[1], dtype=torch.float32)

    def combined(self, tokens, output_tKD) -> None:
        torch.bmm(output_tKD, output_tKD.mT, out=self._product_TKK[tokens])

    def round_ends(self, turn) -> None:
        first, found_EX = turn * self.ranks.world, self._nothing_EX
        if first + self.ranks.rank < len(self.sources):
            source, index_TK, gate_TK = self._routed
            self.coactivation.add(source, index_TK)
            self.agreement.add(source, index_TK, self._product_TKK)
            found_EX = self.powers.of(index_TK, gate_TK, norms(self._product_TKK))
        self._routed = self._product_TKK = None
        for source, own_EX in zip(self.sources[first:], self.ranks.all_gather(found_EX), strict=False):
            self.powers.add(source, own_EX)

    def totals(self, layer: Layer) -> dict[str, torch.Tensor]:
        """The layer's statistics over all ranks. Of the weights' sums an expert is non-zero on one rank only: exact."""
        ranks = self.ranks
        weights_E3 = torch.zeros(len(layer.kept), 3, dtype=torch.float64, device=ranks.device)
        sums = ranks.workers.map(lambda expert: weight_sums(list(expert.values())), layer.experts.values())
        for number, own in zip(layer.experts, sums, strict=True):
            weights_E3[number] = torch.tensor(own, dtype=torch.float64)
        return {
            "router_distance": router_distance(layer.dense[layer.layout.router].float()),
            "coactivation": ranks.sum_integers(self.coactivation.counts_SEE),
            "agreement": ranks.sum_integers(self.agreement.sums_SEE),
            "powers": self.powers.sums_SE33,
            "peak": self.powers.peak_SE,
            "weights": ranks.all_gather(weights_E3).sum(0),
        }


def observe(
    arch: Architecture,
    states: States,
    ranks: Ranks,
    save: Callable[[int, dict[str, torch.Tensor]], None],
    sources: list[int] | None = None,
    outliers: bool = False,
    recorder: Recorder | None = None,
) -> None:
    """Run the dense model; call `save(layer, statistics)` on the first rank for every layer with experts, or with `outliers` for
    every layer.

    `sources[m]` numbers the calibration source of micro-batch m; there is one where it is not given. stun.statistics.store says what
    the statistics are. With a `recorder` it goes on where an interrupted stream ended.
    """
    finished = recorder.finished() if recorder else []
    states = recorder.restore(finished, states) if recorder else states
    owners = [even_owners(layout, ranks.world) if layout.experts else [] for layout in arch.layers]
    stream = LayerStream(arch, ranks, arch.layers, owners, len(finished))
    progress = Progress("observe", len(arch.layers), ranks, len(finished), step=0)
    for layer in stream:
        ranks.doing = f"observe layer {layer.layout.index}"
        ranks.meter.enter("observe")
        watcher = Watcher(layer.layout.num_experts, sources or [0] * states.total, ranks)
        stream.build(layer)
        start = time.perf_counter()
        watchers = (watcher,) if layer.kept else ()
        if outliers:
            counter = OutlierCounter(stream, layer)
            states = counter.run(states, *watchers)
        else:
            states = stream.run(layer, states, *watchers)
        totals = (watcher.totals(layer) if layer.kept else {}) | (counter.totals() if outliers else {})
        powers = {"dense": {"experts": expert_powers(layer, ranks.workers)}} if recorder else {}
        layer.seconds["compute"] = time.perf_counter() - start
        if ranks.is_first and totals:
            save(layer.layout.index, {name: tensor.cpu().contiguous() for name, tensor in totals.items()})
        entry = {"seconds": dict(layer.seconds), "peak_bytes": ranks.lap_memory(), "powers": powers}
        ranks.meter.enter("write wait")
        if recorder:
            layer.seconds["write"] = recorder.wait()
        progress.layer(layer, f"experts {len(layer.kept)}", experts=len(layer.kept))  # first: what is on disk was also told
        if recorder:
            recorder.layer(layer.layout.index, states, entry)
    if recorder:
        recorder.close()
    progress.close()


def _choose(layer: Layer, plan: LayerPlan, ranks: Ranks) -> list[int]:
    """The representative of every cluster, found by the rank that owns the cluster; ascending, the same on every rank."""
    if plan.kept or not plan.clusters:
        return plan.kept
    mine = []
    for cluster in plan.clusters:
        if cluster[0] in layer.experts:
            squared = squared_distance_to_mean([layer.experts[e] for e in cluster]) if len(cluster) > 2 else []
            mine.append(nearest_member(cluster, squared))
    return sorted(expert for chosen in ranks.gather_objects(mine) for expert in chosen)


def keep_representatives(stream: LayerStream, layer: Layer, plan: LayerPlan) -> list[int]:
    """Drop all experts of a layer but one of every cluster, with the cluster's mean where the plan says so; returns who stays."""
    kept = _choose(layer, plan, stream.ranks)
    if plan.mean:
        _reconstruct(layer, plan, kept)
    stream.keep(layer, kept)
    return kept


def squared_distance_to_mean(members: list[dict[str, torch.Tensor]]) -> list[float]:
    """Squared distance of each member's parameters (all parts concatenated) to the members' mean.

    Summed by row and then exactly, so that it does not depend on the number of threads.
    """
    rows: list[list[float]] = [[] for _ in members]
    for part in sorted(members[0]):
        mean_OD = sum(member[part].float() for member in members) / len(members)
        for own, member in zip(rows, members, strict=True):
            own += torch.atleast_2d(member[part].float() - mean_OD).square().sum(1).tolist()
    return [math.fsum(own) for own in rows]


def _reconstruct(layer: Layer, plan: LayerPlan, kept: list[int]) -> None:
    """Give every representative the mean of its cluster's parameters and router entries (STUN, selective reconstruction).

    Means are taken in float32 and stored in the tensor's own dtype.
    """
    for cluster in (members for members in plan.clusters if len(members) > 1):
        (stays,) = set(cluster).intersection(kept)
        if stays in layer.experts:
            for part in layer.experts[stays]:
                mean = sum(layer.experts[e][part].float() for e in sorted(cluster)) / len(cluster)
                layer.experts[stays][part] = mean.to(layer.experts[stays][part].dtype)
        for name, dim in layer.layout.routed.items():
            entries = layer.dense[name].movedim(dim, 0)
            entries[stays] = (sum(entries[e].float() for e in sorted(cluster)) / len(cluster)).to(entries.dtype)


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
    arch: Architecture,
    states: States | None,
    plans: list[LayerPlan],
    quotas: list[LayerQuota],
    how: SparsifyConfig,
    ranks: Ranks,
    recorder: Recorder,
    write: Callable[[str, dict[str, torch.Tensor]], dict],
) -> PruneResult:
    """Prune and write every layer on the hidden states that the already pruned layers before it produce, then the experts of
    multi-token-prediction heads, which lose experts but no single weights.

    `write(name, tensors)` puts a file of this rank on disk and returns its entry for the `recorder`, which knows the layers that
    are finished already. Without `states` nothing is measured: the quotas must all be zero, or `how` one that reads no inputs.
    """
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
            quota = quota_of(plans[index], kept, quotas[index])
            masked = mask_layer(stream, layer, states, quota, how)
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
