"""Counts outliers among the scores of a dense layer's weights, per matrix, for ratios by OWL."""

from __future__ import annotations

import torch

from stun.moments import Moments, pooled
from stun.sparsify.ratios import BINS, score_histogram
from stun.sparsify.scores import require_finite, wanda_scores
from stun.stream import Layer, LayerStream


class OutlierCounter(Moments):
    """Watches one layer; `totals` are histograms of its weights' scores |W_ij| * sqrt(mean over tokens of x_j^2).

    The mean over the tokens a matrix saw, in place of Wanda's sum, makes experts with many tokens and with few comparable. An
    expert that saw none is scored with the inputs of all others together.
    """

    def __init__(self, stream: LayerStream, layer: Layer):
        own = [number for number, owner in enumerate(layer.owner) if owner == stream.ranks.rank]
        super().__init__(stream, layer, sorted(layer.layout.linears), own, grams=False, gated=False)

    def totals(self) -> dict[str, torch.Tensor]:
        """See stun.run.Statistics; all ranks call this together."""
        return self._dense() | (self._experts() if self.layer.kept else {})

    def _dense(self) -> dict[str, torch.Tensor]:
        ranks, found = self.stream.ranks, {}
        rows = sum(len(hidden.flatten(0, -2)) for hidden in self._states.hidden)
        tokens = int(ranks.sum_integers(torch.tensor([rows], device=ranks.device)))
        for name in self.names:
            counts_B = torch.zeros(BINS, dtype=torch.int64, device=ranks.device)
            total = torch.zeros((), dtype=torch.float64, device=ranks.device)
            if self.owners[name] == ranks.rank:
                scores_OD = wanda_scores(self.layer.dense[name], self.dense[name]["inputs"] / tokens)
                require_finite(scores_OD, f"{name}: score")
                counts_B, sum_ = score_histogram(scores_OD)
                total += sum_
            found[f"outliers of {name}"] = ranks.sum_integers(counts_B).to(torch.int32)
            found[f"sum of {name}"] = ranks.all_gather(total).sum(0)
        return found

    def _experts(self) -> dict[str, torch.Tensor]:
        ranks, layer = self.stream.ranks, self.layer
        tokens_E = ranks.sum_integers(self.tokens.to(ranks.device)).tolist()
        everyone = pooled(self.experts, ranks) if 0 in tokens_E else {}
        counts_EB = torch.zeros(len(layer.kept), BINS, dtype=torch.int64, device=ranks.device)
        sums_E = torch.zeros(len(layer.kept), dtype=torch.float64, device=ranks.device)
        for number in self.numbers:
            sums = self.experts[number] if tokens_E[number] else everyone
            for part, squares_D in sums.items():
                weight_OD = layer.layout.oriented(layer.experts[layer.kept[number]][part])
                count = tokens_E[number] or sum(tokens_E)
                scores_OD = wanda_scores(weight_OD, squares_D / count)
                require_finite(scores_OD, f"layer {layer.layout.index} expert {layer.kept[number]} {part}: score")
                counts_B, sum_ = score_histogram(scores_OD)
                counts_EB[number] += counts_B
                sums_E[number] += sum_
        return {"outliers": ranks.sum_integers(counts_EB).to(torch.int32), "outlier_sums": ranks.all_gather(sums_E).sum(0)}
