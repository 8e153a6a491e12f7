"""The two streams over the decoder layers: `observe` (dense) and `prune_layers` (drop, measure, mask, propagate, write)."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from stun.arch import Architecture
from stun.budget import LayerQuota
from stun.config import StunError
from stun.layout import LayerLayout, renumber
from stun.plan import LayerPlan, representative
from stun.ranks import Ranks
from stun.sparsify import require_finite, smallest_per_row, wanda_scores
from stun.stats import CoActivation, OutputNorms, squared_sum
from stun.stream import Layer, LayerStream, ShardWriter, States, even_owners


class _Watcher:
    """Collects selection statistics of one layer."""

    def __init__(self, num_experts: int, device: torch.device):
        self.coactivation = CoActivation(num_experts, device)
        self.outputs = OutputNorms(num_experts, device)

    def routing(self, index_TK: torch.Tensor) -> None:
        self.coactivation.add(index_TK)

    def expert(self, expert, input_nD, inner_nI, output_nD, gate_n) -> None:
        self.outputs.add(expert, output_nD, gate_n)


def observe(arch: Architecture, states: States, ranks: Ranks, save: Callable[[int, dict[str, torch.Tensor]], None]) -> None:
    """Run the dense model; call `save(layer, statistics)` on the first rank for every layer with experts.

    Statistics: `router` [E, D] float32, `coactivation` [E, E] int64, `outputs` [E, 5] float64 (columns of OutputNorms).
    """
    owners = [even_owners(layout, ranks.world) if layout.experts else [] for layout in arch.layers]
    stream = LayerStream(arch, ranks, arch.layers, owners)
    progress = Progress("observe", len(arch.layers), ranks)
    for layer in stream:
        watcher = _Watcher(layer.layout.num_experts, ranks.device)
        stream.build(layer)
        start = time.perf_counter()
        states = stream.run(layer, states, watcher if layer.kept else None)
        layer.seconds["compute"] = time.perf_counter() - start
        if layer.kept:
            coactivation_EE = ranks.sum_integers(watcher.coactivation.counts_EE)
            outputs_E5 = ranks.all_gather(watcher.outputs.sums_E5).sum(0)  # an expert is non-zero on one rank only: exact
            if ranks.is_first:
                router_ED = layer.dense[layer.layout.router].float()
                statistics = {"router": router_ED, "coactivation": coactivation_EE, "outputs": outputs_E5}
                save(layer.layout.index, {name: tensor.cpu() for name, tensor in statistics.items()})
        progress.layer(layer, f"experts {len(layer.kept)}")


class _Moments:
    """Collects, for every matrix of a layer, the sum of squares of each column of its inputs."""

    def __init__(self, layer: Layer):
        self.experts: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        self.tokens = torch.zeros(len(layer.kept), dtype=torch.int64)
        self.dense: dict[str, list[torch.Tensor]] = defaultdict(list)

    def routing(self, index_TK: torch.Tensor) -> None:
        pass

    def expert(self, expert, input_nD, inner_nI, output_nD, gate_n) -> None:
        self.tokens[expert] += len(input_nD)
        for part, rows in (("gate_up_proj", input_nD), ("down_proj", inner_nI)):
            add, own = squared_sum(rows), self.experts[expert]
            own[part] = own[part] + add if part in own else add

    def hook(self, name: str):
        """A forward pre-hook that records one micro-batch's inputs of the linear module whose weight is `name`."""
        return lambda module, arguments: self.dense[name].append(squared_sum(arguments[0].flatten(0, -2)))


def _measure(stream: LayerStream, layer: Layer, states: States, names: list[str]) -> _Moments:
    """Run the layer once for its moments; its outputs are discarded, since its weights are about to change."""
    moments = _Moments(layer)
    modules = {name: layer.module.get_submodule(layer.layout.dense[name].rpartition(".")[0]) for name in names}
    hooks = [module.register_forward_pre_hook(moments.hook(name)) for name, module in modules.items()]
    stream.run(layer, states, moments)
    for hook in hooks:
        hook.remove()
    for name in names:
        if len(moments.dense[name]) != len(states.hidden):
            raise StunError(
                f"{name}: ran {len(moments.dense[name])} times in {len(states.hidden)} micro-batches; its inputs are not known"
            )
    return moments


def _sum_over_micro_batches(partial: list[torch.Tensor], states: States, ranks: Ranks, width: int) -> torch.Tensor:
    """[D] total of the micro-batches of all ranks, added in their order."""
    turns = -(-states.total // ranks.world)
    own_MD = torch.zeros(turns, width, dtype=torch.float64, device=ranks.device)
    for turn, row_D in enumerate(partial):
        own_MD[turn] = row_D
    return ranks.all_gather(own_MD).transpose(0, 1).reshape(-1, width)[: states.total].sum(0)


def _pooled(moments: _Moments, layer: Layer, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The layer's moments over all experts, the stand-in for an expert that saw no token; added in expert order."""
    own = {expert: {part: row.cpu() for part, row in parts.items()} for expert, parts in moments.experts.items()}
    everyone = {expert: parts for gathered in ranks.gather_objects(own) for expert, parts in gathered.items()}
    pooled: dict[str, torch.Tensor] = {}
    for expert in sorted(everyone):
        for part, row in everyone[expert].items():
            pooled[part] = pooled[part] + row if part in pooled else row
    return {part: row.to(ranks.device) for part, row in pooled.items()}


def _remove(weight_OD: torch.Tensor, squared_sum_D: torch.Tensor, count: int, what: str) -> None:
    """Zero the `count` weights of a matrix with the lowest scores, in place."""
    if count:
        scores_OD = wanda_scores(weight_OD, squared_sum_D)
        require_finite(scores_OD, f"{what}: Wanda score")
        weight_OD.masked_fill_(smallest_per_row(scores_OD, count), 0)


def _mask(stream: LayerStream, layer: Layer, states: States, quota: LayerQuota) -> int:
    """Measure the layer and zero what its quota asks for, in place; returns the number of experts that saw no token."""
    ranks = stream.ranks
    names = [name for name, count in quota.dense.items() if count]
    if not names and not any(count for expert in quota.experts for count in expert.values()):
        return 0
    moments = _measure(stream, layer, states, names)
    owners = stream.writer_of(layer.layout)
    for name in names:
        weight = layer.dense[name]
        total_D = _sum_over_micro_batches(moments.dense[name], states, ranks, weight.shape[1])
        if owners[name] == ranks.rank:
            _remove(weight, total_D, quota.dense[name], name)
        ranks.broadcast(weight, owners[name])
    tokens_E = ranks.sum_integers(moments.tokens.to(ranks.device)).cpu()
    unseen = int((tokens_E == 0).sum())
    pooled = _pooled(moments, layer, ranks) if unseen else {}
    for number, expert in enumerate(layer.kept):
        if layer.owner[number] == ranks.rank:
            rows = moments.experts.get(number) or pooled
            for part, count in quota.experts[number].items():
                weight_OD = layer.layout.oriented(layer.experts[expert][part])
                _remove(weight_OD, rows[part], count, f"layer {layer.layout.index} expert {expert} {part}")
    return unseen


def _choose(layer: Layer, plan: LayerPlan, saliency_E: list[float], ranks: Ranks) -> list[int]:
    """The representative of every cluster, found by the rank that owns the cluster; ascending, the same on every rank."""
    mine = []
    for cluster in plan.clusters:
        if cluster[0] in layer.experts:
            squared = _squared_distance_to_mean([layer.experts[e] for e in cluster]) if len(cluster) > 2 else [0.0] * len(cluster)
            mine.append(representative(cluster, squared, [saliency_E[e] for e in cluster]))
    return sorted(expert for chosen in ranks.gather_objects(mine) for expert in chosen)


def _squared_distance_to_mean(members: list[dict[str, torch.Tensor]]) -> list[float]:
    """Squared distance of each member's parameters (all parts concatenated) to the members' mean.

    Summed by row and then exactly, so that it does not depend on the number of threads.
    """
    rows: list[list[float]] = [[] for _ in members]
    for part in sorted(members[0]):
        mean_OD = sum(member[part].float() for member in members) / len(members)
        for own, member in zip(rows, members, strict=True):
            own += torch.atleast_2d(member[part].float() - mean_OD).square().sum(1).tolist()
    return [math.fsum(own) for own in rows]


@dataclass
class PruneResult:
    """What the second stream did: surviving experts by layer, non-zero weights of the decoder layers as written, experts that
    saw no token, bytes written by all ranks."""

    kept: list[list[int]] = field(default_factory=list)
    nonzero: int = 0
    unseen: int = 0
    bytes_written: int = 0


def cluster_owners(layout_experts: int, plan: LayerPlan, world: int) -> list[int | None]:
    """Owner of every expert for the second stream: clusters stay together, survivors are spread evenly.

    Where the representatives are chosen already, only they have an owner: nobody reads the others.
    """
    owners: list[int | None] = [None] * layout_experts
    for place, cluster in enumerate(plan.clusters):
        for expert in cluster:
            if not plan.kept or expert in plan.kept:
                owners[expert] = place * world // len(plan.clusters)
    return owners


def prune_layers(
    arch: Architecture,
    states: States | None,
    plans: list[LayerPlan],
    quotas: list[LayerQuota],
    saliencies: list[list[float]],
    ranks: Ranks,
    writer: ShardWriter,
    shards: list[list[str | None]],
) -> PruneResult:
    """Prune and write every layer on the hidden states that the already pruned layers before it produce, then the experts of
    multi-token-prediction heads, which lose experts but no single weights.

    `shards[l][r]` is the file of rank r's part of layer l. Without `states` nothing is measured: the quotas must all be zero.
    """
    layouts = [*arch.layers, *arch.mtp]
    owners = [cluster_owners(p.experts, p, ranks.world) for p in plans]
    stream, result = LayerStream(arch, ranks, layouts, owners), PruneResult()
    progress = Progress("prune", len(layouts), ranks)
    for layer in stream:
        index, start = layer.layout.index, time.perf_counter()
        kept = _choose(layer, plans[index], saliencies[index], ranks) if plans[index].clusters else []
        stream.keep(layer, kept)
        result.kept.append(kept)
        if states is not None and not layer.layout.is_mtp:
            stream.build(layer)
            result.unseen += _mask(stream, layer, states, quotas[index])
            stream.build(layer)
            states = stream.run(layer, states)
        layer.seconds["compute"] = time.perf_counter() - start
        tensors = _own_tensors(stream, layer)
        own = torch.tensor([sum(int(t.count_nonzero()) for t in tensors.values())], device=ranks.device)
        nonzero = int(ranks.sum_integers(own))
        result.nonzero += 0 if layer.layout.is_mtp else nonzero
        if tensors:
            layer.seconds["write"] = writer.submit(shards[index][ranks.rank], tensors)
        share = nonzero / arch.parameters_of(layer.layout)
        progress.layer(layer, f"experts {plans[index].experts}->{len(kept)} | nonzero {share:.3f}")
    writer.close()
    return result


def _own_tensors(stream: LayerStream, layer: Layer) -> dict[str, torch.Tensor]:
    """What this rank writes of a layer, under source names, survivors renumbered."""
    writers, rank, layout = stream.writer_of(layer.layout), stream.ranks.rank, layer.layout
    tensors = {name: tensor for name, tensor in layer.dense.items() if writers[name] == rank} | layer.unused
    for number, expert in enumerate(layer.kept):
        if layer.owner[number] == rank:
            for part in layout.experts[expert].keys() - layout.fused:
                names = layout.experts[expert][part]
                rows = [stream.arch.info(name).shape[0] for name in names]
                pieces = layer.experts[expert][part].split(rows)
                tensors |= {renumber(name, number): piece for name, piece in zip(names, pieces, strict=True)}
    for part, name in layout.fused_names.items():
        joined = _joined(stream, layer, part, writers[name])
        if writers[name] == rank:
            tensors[name] = joined
    return tensors


def _joined(stream: LayerStream, layer: Layer, part: str, writer: int) -> torch.Tensor:
    """One part of all surviving experts in one tensor on the CPU of rank `writer`, sent there expert by expert; empty
    elsewhere."""
    ranks = stream.ranks
    (piece,) = stream.arch.piece(layer.layout, 0, part)
    shape = (len(layer.kept) if ranks.rank == writer else 0, *piece.shape)
    joined_E = torch.empty(shape, dtype=piece.dtype)
    for number, expert in enumerate(layer.kept):
        own = layer.experts[expert][part] if expert in layer.experts else None
        ranks.move(own, joined_E[number] if ranks.rank == writer else joined_E, layer.owner[number], writer)
    return joined_E


def shard_files(arch: Architecture, plans: list[LayerPlan], world: int) -> tuple[str, list[list[str | None]]]:
    """File names in the hub's form: one for everything outside the layers, then one per layer and rank that has a part of it."""
    parts = []
    for layout, plan in zip([*arch.layers, *arch.mtp], plans, strict=True):
        busy = set(range(min(len(layout.copied) + len(layout.fused), world)))
        if not _is_fused(layout):
            busy |= {owner for owner in cluster_owners(plan.experts, plan, world) if owner is not None}
        parts += [(layout.index, rank) for rank in sorted(busy)]
    names = [f"model-{number + 1:05d}-of-{len(parts) + 1:05d}.safetensors" for number in range(len(parts) + 1)]
    table: list[list[str | None]] = [[None] * world for _ in plans]
    for (index, rank), name in zip(parts, names[1:], strict=True):
        table[index][rank] = name
    return names[0], table


def _is_fused(layout: LayerLayout) -> bool:
    """Whether no expert of the layer has a tensor of its own."""
    return bool(layout.experts) and layout.fused == layout.experts[0].keys()


class Progress:
    """One line a layer on the first rank: what was done, seconds read, computed and waited for writing, memory, time left."""

    def __init__(self, name: str, layers: int, ranks: Ranks):
        self.name, self.layers, self.ranks = name, layers, ranks
        self.started = time.perf_counter()

    def layer(self, layer: Layer, what: str) -> None:
        done = layer.layout.index + 1
        left = (time.perf_counter() - self.started) / done * (self.layers - done)
        seconds = " ".join(f"{name} {value:.1f}s" for name, value in layer.seconds.items())
        peak = self.ranks.peak_memory() / 2**30
        self.ranks.log(f"{self.name} {done:02d}/{self.layers} | {what} | {seconds} | peak {peak:.2f}GiB | eta {left:.0f}s")
