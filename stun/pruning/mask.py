"""Weight pruning of one layer: measure the inputs of its matrices, then remove the weights of its quota."""

from dataclasses import dataclass, field

import torch

from stun.config import SparsifyConfig, SparsifyMethod
from stun.planning.budget import LayerQuota
from stun.pruning.reconstruct import Reconstruction, Solved
from stun.sparsify.matrix import sparsify
from stun.sparsify.saliency import STRIDE, Saliency
from stun.statistics.input_moments import Moments, pooled
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream, States


@dataclass
class Masking:
    """Removal of a layer's weights, in place.

    `states` may be None if the method reads no inputs. `solved(place, weight_OD, gram_DD)` is called with every matrix whose
    inputs' Gram matrix was read; its place is an expert and a part, or a name. `tokens` counts those of this rank's experts.
    """

    stream: LayerStream
    layer: Layer
    states: States | None
    quota: LayerQuota
    config: SparsifyConfig
    solved: Solved = lambda *_: None
    saliency: Saliency = field(default_factory=Saliency)
    tokens: torch.Tensor = field(init=False)

    @property
    def names(self) -> list[str]:
        """Dense matrices that lose weights."""
        return [name for name, count in self.quota.dense.items() if count]

    def run(self) -> tuple[int, Saliency]:
        """Remove the quota's weights. Returns the number of experts without tokens, and this rank's scores. All ranks call this
        together."""
        if not self.names and not any(count for expert in self.quota.experts for count in expert.values()):
            return 0, self.saliency
        ranks, layer, owners = self.stream.ranks, self.layer, self.stream.writer_of(self.layer.layout)
        blocks = self._blocks()
        reconstruction = Reconstruction(self.stream, layer, self.names, blocks) if self.config.reconstruct else None
        dense, norms = self._experts(blocks, reconstruction)
        ranks.meter.enter("mask")
        mine = [name for name in self.names if owners[name] == ranks.rank]
        moments = {name: dense[name]["inputs"] if self.config.reads_inputs else None for name in mine}
        ranks.workers.map(lambda name: self._matrix(layer.dense[name], moments[name], self.quota.dense[name], name), mine)
        for name in self.names:
            ranks.broadcast(layer.dense[name], owners[name])
        unseen = self._unseen(norms) if self.config.reads_inputs else 0
        if reconstruction:
            ranks.meter.enter("refit")
            reconstruction.refit(self.states, self._solved)
        return unseen, self.saliency

    def _blocks(self) -> list[list[int]]:
        """This rank's experts that lose weights, in blocks whose Gram matrices fit `gram_gib`; the last ones may be empty.

        Every rank has the same number of blocks, since measuring one is collective.
        """
        ranks, layer = self.stream.ranks, self.layer
        mine = [n for n, owner in enumerate(layer.owner) if owner == ranks.rank and any(self.quota.experts[n].values())]
        size = max(1, len(mine))
        if mine and self.config.reads_grams:
            parts = [layer.layout.oriented(weight) for weight in layer.experts[layer.kept[mine[0]]].values() if weight.dim() > 1]
            needed = sum(4 * weight.shape[1] ** 2 for weight in parts) * (2 if self.config.reconstruct else 1)
            size = max(1, int(self.config.gram_gib * 2**30 / needed))
        blocks = [mine[start : start + size] for start in range(0, len(mine), size)]
        return blocks + [[] for _ in range(max(1, *ranks.gather_objects(len(blocks))) - len(blocks))]

    def _experts(self, blocks: list[list[int]], reconstruction: Reconstruction | None):
        """Measure and prune the experts with tokens, block by block; the first block measures the dense matrices too.

        Returns the moments of the dense matrices, and by part the inputs' sums of squares of every expert with tokens.
        """
        dense, norms = {}, {}
        for place, block in enumerate(blocks):
            moments, ranks = None, self.stream.ranks
            ranks.meter.enter("measure")
            if self.config.reads_inputs:
                gated, is_first = self.config.method is SparsifyMethod.moe_pruner, place == 0
                remember = reconstruction.names if reconstruction and is_first else ()
                names = self.names if is_first else []
                moments = Moments(self.stream, self.layer, names, block, self.config.reads_grams, gated, remember)
                moments.measure(self.states)
                if is_first:
                    self.tokens, dense = moments.tokens, moments.dense
                if remember:
                    reconstruction.inputs = moments.inputs
            ranks.meter.enter("mask")
            measured = {number: moments.experts.get(number) if moments else {} for number in block}
            seen = {number: sums for number, sums in measured.items() if sums is not None}
            ranks.workers.map(lambda entry: self._expert(*entry), seen.items())
            # The diagonal holds the sums of squares; cloned, so that the Gram matrix is freed with its block.
            for number, sums in seen.items():
                norms[number] = {part: total.diagonal().clone() if total.dim() == 2 else total for part, total in sums.items()}
        return dense, norms

    def _expert(self, number: int, sums: dict[str, torch.Tensor]) -> None:
        """Prune one expert; `sums` are its inputs' moments by part."""
        for part, count in self.quota.experts[number].items():
            if count:
                self._matrix(self._oriented(number, part), sums.get(part), count, (self.layer.kept[number], part))

    def _oriented(self, number: int, part: str) -> torch.Tensor:
        """Matrix [O, D] of an expert kept."""
        return self.layer.layout.oriented(self.layer.experts[self.layer.kept[number]][part])

    def _matrix(self, weight_OD: torch.Tensor, moment: torch.Tensor | None, count: int, place: tuple[int, str] | str) -> None:
        """Prune one matrix, and count the scores of every STRIDE-th row."""
        name = place if isinstance(place, str) else f"layer {self.layer.layout.index} expert {place[0]} {place[1]}"
        dense_oD = weight_OD[::STRIDE].clone()
        weight_OD.copy_(sparsify(self.config, weight_OD, moment, count, name))
        closes = self.layer.layout.closes(place) if isinstance(place, str) else place[1] == "down_proj"
        if self.config.reads_grams and not (self.config.reconstruct and closes):  # that will have other values
            self._solved(place, weight_OD, moment)
        self.saliency.add(self.config, dense_oD, weight_OD[::STRIDE] == 0, moment)

    def _solved(self, place: tuple[int, str] | str, weight_OD: torch.Tensor, gram_DD: torch.Tensor) -> None:
        """Tell of a matrix, but of none of an expert with fewer tokens than inputs: they say too little of other tokens."""
        if isinstance(place, str) or int(self.tokens[self.layer.kept.index(place[0])]) >= weight_OD.shape[1]:
            self.solved(place, weight_OD, gram_DD)

    def _unseen(self, norms: dict[int, dict[str, torch.Tensor]]) -> int:
        """Prune the experts without tokens by the pooled inputs of all other experts; returns their number."""
        ranks = self.stream.ranks
        seen_E = ranks.sum_integers(self.tokens.to(ranks.device)).cpu() > 0
        if seen_E.all():
            return 0
        stand_in = pooled(norms, ranks)
        for number in (~seen_E).nonzero().flatten().tolist():
            if self.layer.owner[number] == ranks.rank:
                wanted = {part for part, count in self.quota.experts[number].items() if count}
                for part in wanted - stand_in.keys():  # of experts with tokens none loses any of these
                    width = self._oriented(number, part).shape[1]
                    stand_in[part] = torch.ones(width, dtype=torch.float64, device=ranks.device)
                sums = {part: sum_D.diag().float() if self.config.reads_grams else sum_D for part, sum_D in stand_in.items()}
                self._expert(number, sums)
        return int((~seen_E).sum())
