"""Single weights of one layer: measure what its matrices see, and remove what its quota asks for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from stun.config import SparsifyConfig, SparsifyMethod
from stun.planning.budget import LayerQuota
from stun.pruning.reconstruct import Reconstruction
from stun.sparsify.matrix import sparsify
from stun.sparsify.saliency import STRIDE, Saliency
from stun.statistics.input_moments import Moments, pooled
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream, States


@dataclass
class Masked:
    """What was done to a layer: the number of experts that saw no token, and this rank's scores."""

    unseen: int
    saliency: Saliency


def mask_layer(stream: LayerStream, layer: Layer, states: States | None, quota: LayerQuota, how: SparsifyConfig) -> Masked:
    """Remove what the quota asks for, in place.

    `states` may be None where `how` reads no inputs. All ranks call this together.
    """
    names = [name for name, count in quota.dense.items() if count]
    if not names and not any(count for expert in quota.experts for count in expert.values()):
        return Masked(0, Saliency())
    return _Masking(stream, layer, states, quota, how, names).run()


@dataclass
class _Masking:
    """What is done to one layer. `names` are the dense matrices that lose weights."""

    stream: LayerStream
    layer: Layer
    states: States | None
    quota: LayerQuota
    how: SparsifyConfig
    names: list[str]
    saliency: Saliency = field(default_factory=Saliency)

    def run(self) -> Masked:
        """See `mask_layer`."""
        ranks, layer, owners = self.stream.ranks, self.layer, self.stream.writer_of(self.layer.layout)
        blocks = self._blocks()
        reconstruction = Reconstruction(self.stream, layer, self.names, blocks) if self.how.reconstruct else None
        tokens, dense, norms = self._experts(blocks, reconstruction)
        ranks.meter.enter("mask")
        mine = [name for name in self.names if owners[name] == ranks.rank]
        ranks.workers.map(lambda name: self._dense(name, dense[name]["inputs"] if self.how.reads_inputs else None), mine)
        for name in self.names:
            ranks.broadcast(layer.dense[name], owners[name])
        unseen = self._unseen(tokens, norms) if self.how.reads_inputs else 0
        if reconstruction:
            ranks.meter.enter("refit")
            reconstruction.refit(self.states)
        return Masked(unseen, self.saliency)

    def _blocks(self) -> list[list[int]]:
        """This rank's experts that lose weights, in the groups that are measured together: as many blocks on every rank, the
        last ones perhaps empty."""
        ranks, layer = self.stream.ranks, self.layer
        mine = [n for n, owner in enumerate(layer.owner) if owner == ranks.rank and any(self.quota.experts[n].values())]
        size = max(1, len(mine))
        if mine and self.how.reads_grams:
            parts = [layer.layout.oriented(weight) for weight in layer.experts[layer.kept[mine[0]]].values() if weight.dim() > 1]
            needed = sum(4 * weight.shape[1] ** 2 for weight in parts) * (2 if self.how.reconstruct else 1)
            size = max(1, int(self.how.gram_gib * 2**30 / needed))
        blocks = [mine[start : start + size] for start in range(0, len(mine), size)]
        return blocks + [[] for _ in range(max(1, *ranks.gather_objects(len(blocks))) - len(blocks))]

    def _experts(self, blocks: list[list[int]], reconstruction: Reconstruction | None):
        """Measure and prune the experts that saw tokens, block by block; the first block measures the dense matrices as well.

        Returns the tokens of every expert of this rank, the moments of the dense matrices, and the inputs' sums of squares of
        every expert that saw tokens, by part.
        """
        tokens, dense, norms = torch.zeros(len(self.layer.kept), dtype=torch.int64), {}, {}
        for place, block in enumerate(blocks):
            moments, ranks = None, self.stream.ranks
            ranks.meter.enter("measure")
            if self.how.reads_inputs:
                gated, is_first = self.how.method is SparsifyMethod.moe_pruner, place == 0
                remember = reconstruction.names if reconstruction and is_first else ()
                names = self.names if is_first else []
                moments = Moments(self.stream, self.layer, names, block, self.how.reads_grams, gated, remember)
                moments.measure(self.states)
                if is_first:
                    tokens, dense = moments.tokens, moments.dense
                if remember:
                    reconstruction.inputs = moments.inputs
            ranks.meter.enter("mask")
            found = {number: moments.experts.get(number) if moments else {} for number in block}
            seen = {number: sums for number, sums in found.items() if sums is not None}
            ranks.workers.map(lambda own: self._expert(*own), seen.items())
            for number, sums in seen.items():
                norms[number] = {part: own.diagonal().clone() if own.dim() == 2 else own for part, own in sums.items()}
        return tokens, dense, norms

    def _expert(self, number: int, sums: dict[str, torch.Tensor]) -> None:
        """Prune one expert by its inputs' moments, by part."""
        layer, expert = self.layer, self.layer.kept[number]
        for part, count in self.quota.experts[number].items():
            if count:
                weight_OD = layer.layout.oriented(layer.experts[expert][part])
                what = f"layer {layer.layout.index} expert {expert} {part}"
                self._matrix(weight_OD, sums.get(part), count, what)

    def _dense(self, name: str, moment: torch.Tensor | None) -> None:
        """Prune one dense matrix by its inputs' moment."""
        self._matrix(self.layer.dense[name], moment, self.quota.dense[name], name)

    def _matrix(self, weight_OD: torch.Tensor, moment: torch.Tensor | None, count: int, what: str) -> None:
        """Prune one matrix, and count the scores of some of its rows."""
        dense_oD = weight_OD[::STRIDE].clone()
        weight_OD.copy_(sparsify(self.how, weight_OD, moment, count, what))
        self.saliency.add(self.how, dense_oD, weight_OD[::STRIDE] == 0, moment)

    def _unseen(self, tokens: torch.Tensor, norms: dict[int, dict[str, torch.Tensor]]) -> int:
        """Prune the experts that saw no token by the inputs of all others together; returns how many there are."""
        ranks = self.stream.ranks
        seen_E = ranks.sum_integers(tokens.to(ranks.device)).cpu() > 0
        if seen_E.all():
            return 0
        stand_in = pooled(norms, ranks)
        for number in (~seen_E).nonzero().flatten().tolist():
            if self.layer.owner[number] == ranks.rank:
                sums = {part: own_D.diag().float() if self.how.reads_grams else own_D for part, own_D in stand_in.items()}
                self._expert(number, sums)
        return int((~seen_E).sum())
