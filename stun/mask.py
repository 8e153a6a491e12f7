"""Single weights of one layer: measure what its matrices see, and remove what its quota asks for."""

from __future__ import annotations

import torch

from stun.budget import LayerQuota
from stun.config import SparsifyConfig, SparsifyMethod
from stun.moments import Moments, pooled
from stun.ranks import Ranks
from stun.reconstruct import Reconstruction
from stun.sparsify.matrix import sparsify
from stun.stream import Layer, LayerStream, States


def mask_layer(stream: LayerStream, layer: Layer, states: States | None, quota: LayerQuota, how: SparsifyConfig) -> int:
    """Remove what the quota asks for, in place; returns the number of experts that saw no token.

    `states` may be None where `how` reads no inputs. All ranks call this together.
    """
    names = [name for name, count in quota.dense.items() if count]
    if not names and not any(count for expert in quota.experts for count in expert.values()):
        return 0
    blocks = expert_blocks(layer, quota, how, stream.ranks)
    reconstruction = Reconstruction(stream, layer, names) if how.reconstruct else None
    tokens, dense, norms = _mask_experts(stream, layer, states, names, quota, how, blocks, reconstruction)
    for name in names:
        weight_OD = layer.dense[name]
        if stream.writer_of(layer.layout)[name] == stream.ranks.rank:
            moment = dense[name]["inputs"] if how.reads_inputs else None
            weight_OD.copy_(sparsify(how, weight_OD, moment, quota.dense[name], name))
        stream.ranks.broadcast(weight_OD, stream.writer_of(layer.layout)[name])
    unseen = _mask_unseen(layer, tokens, norms, quota, how, stream.ranks) if how.reads_inputs else 0
    if reconstruction:
        reconstruction.refit(states, blocks)
    return unseen


def expert_blocks(layer: Layer, quota: LayerQuota, how: SparsifyConfig, ranks: Ranks) -> list[list[int]]:
    """This rank's experts that lose weights, in the groups that are measured together: as many blocks on every rank, the last
    ones perhaps empty."""
    mine = [n for n, owner in enumerate(layer.owner) if owner == ranks.rank and any(quota.experts[n].values())]
    size = max(1, len(mine))
    if mine and how.reads_grams:
        parts = [layer.layout.oriented(weight) for weight in layer.experts[layer.kept[mine[0]]].values() if weight.dim() > 1]
        needed = sum(4 * weight.shape[1] ** 2 for weight in parts) * (2 if how.reconstruct else 1)
        size = max(1, int(how.gram_gib * 2**30 / needed))
    blocks = [mine[start : start + size] for start in range(0, len(mine), size)]
    return blocks + [[] for _ in range(max(1, *ranks.gather_objects(len(blocks))) - len(blocks))]


def _mask_experts(stream, layer: Layer, states, names, quota: LayerQuota, how: SparsifyConfig, blocks, reconstruction):
    """Measure and prune the experts that saw tokens, block by block; the first block measures the dense matrices as well.

    Returns the tokens of every expert of this rank, the moments of the dense matrices, and the inputs' sums of squares of every
    expert that saw tokens, by part.
    """
    tokens, dense, norms = torch.zeros(len(layer.kept), dtype=torch.int64), {}, {}
    for place, block in enumerate(blocks):
        moments = None
        if how.reads_inputs:
            gated = how.method is SparsifyMethod.moe_pruner
            remember = reconstruction.names if reconstruction and not place else ()
            moments = Moments(stream, layer, [] if place else names, block, how.reads_grams, gated, remember)
            moments.run(states)
            if not place:
                tokens, dense = moments.tokens, moments.dense
            if remember:
                reconstruction.inputs = moments.inputs
        for number in block:
            sums = moments.experts.get(number) if moments else {}
            if sums is not None:
                _mask_expert(layer, number, sums, quota, how)
                norms[number] = {part: sum_.diagonal().clone() if sum_.dim() == 2 else sum_ for part, sum_ in sums.items()}
    return tokens, dense, norms


def _mask_expert(layer: Layer, number: int, sums: dict[str, torch.Tensor], quota: LayerQuota, how: SparsifyConfig) -> None:
    expert = layer.kept[number]
    for part, count in quota.experts[number].items():
        if count:
            weight_OD = layer.layout.oriented(layer.experts[expert][part])
            what = f"layer {layer.layout.index} expert {expert} {part}"
            weight_OD.copy_(sparsify(how, weight_OD, sums.get(part), count, what))


def _mask_unseen(layer: Layer, tokens, norms, quota: LayerQuota, how: SparsifyConfig, ranks: Ranks) -> int:
    """Prune the experts that saw no token by the inputs of all others together; returns how many there are."""
    seen_E = ranks.sum_integers(tokens.to(ranks.device)).cpu() > 0
    if seen_E.all():
        return 0
    stand_in = pooled(norms, ranks)
    for number in (~seen_E).nonzero().flatten().tolist():
        if layer.owner[number] == ranks.rank:
            sums = {part: norm_D.diag().float() if how.reads_grams else norm_D for part, norm_D in stand_in.items()}
            _mask_expert(layer, number, sums, quota, how)
    return int((~seen_E).sum())
