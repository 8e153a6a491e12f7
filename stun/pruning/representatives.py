"""Representatives: the one expert kept of every cluster, with its own weights or the mean of its cluster's."""

import math

import torch

from stun.planning.plan import LayerPlan
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream


def keep_representatives(
    stream: LayerStream, layer: Layer, plan: LayerPlan, constants_ED: torch.Tensor | None = None
) -> list[int]:
    """Remove all experts of a layer but one of every cluster, with their rows of the router unless `constants_ED` are their
    outputs; returns the experts kept, ascending. All ranks call this together."""
    kept = plan.kept
    if not kept and plan.clusters:  # the rank that owns a cluster chooses
        mine = [nearest_member(cluster, layer.experts) for cluster in plan.clusters if cluster[0] in layer.experts]
        kept = sorted(expert for chosen in stream.ranks.gather_objects(mine) for expert in chosen)
    if plan.mean:
        _reconstruct(layer, plan, kept)
    stream.keep(layer, kept, constants_ED)
    return kept


def nearest_member(cluster: list[int], experts: dict[int, dict[str, torch.Tensor]]) -> int:
    """The member whose parameters (all parts concatenated) are nearest the cluster's mean; ties go to the first, as do pairs,
    whose members are equally near."""
    if len(cluster) < 3:
        return cluster[0]
    members = [experts[expert] for expert in cluster]
    # Summed by row and then exactly: one long sum would depend on the number of threads.
    rows: list[list[float]] = [[] for _ in members]
    for part in sorted(members[0]):
        mean_OD = sum(member[part].float() for member in members) / len(members)
        for sums, member in zip(rows, members, strict=True):
            sums += torch.atleast_2d(member[part].float() - mean_OD).square().sum(1).tolist()
    squared = [math.fsum(sums) for sums in rows]
    return cluster[squared.index(min(squared))]


def _reconstruct(layer: Layer, plan: LayerPlan, kept: list[int]) -> None:
    """Give every representative the mean of its cluster's parameters and router rows (STUN, selective reconstruction)."""
    # Means are taken in float32, in ascending order of the experts, so that they do not depend on the cluster's order.
    for cluster in (members for members in plan.clusters if len(members) > 1):
        (representative,) = set(cluster).intersection(kept)
        if representative in layer.experts:
            for part in layer.experts[representative]:
                mean = sum(layer.experts[e][part].float() for e in sorted(cluster)) / len(cluster)
                layer.experts[representative][part] = mean.to(layer.experts[representative][part].dtype)
        for name, dim in layer.layout.routed.items():
            entries = layer.dense[name].movedim(dim, 0)
            entries[representative] = (sum(entries[e].float() for e in sorted(cluster)) / len(cluster)).to(entries.dtype)
