"""Histograms of weight scores in the dense model, per matrix, for OWL's sparsity ratios."""

import torch

from stun.sparsify.ratios import BINS, score_histogram
from stun.sparsify.scores import require_finite, wanda_scores
from stun.statistics.input_moments import Moments, pooled
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream


class OutlierCounter(Moments):
    """Observer of one layer; `totals` are histograms of its weights' scores |W_ij| * sqrt(mean over tokens of x_j^2).

    The mean over a matrix' tokens, in place of Wanda's sum, makes experts with many and few tokens comparable. An expert without
    tokens is scored with the inputs of all experts.
    """

    def __init__(self, stream: LayerStream, layer: Layer):
        numbers = [number for number, owner in enumerate(layer.owner) if owner == stream.ranks.rank]
        super().__init__(stream, layer, sorted(layer.layout.linears), numbers, grams=False, gated=False)
        self.ranks = stream.ranks

    def totals(self) -> dict[str, torch.Tensor]:
        """Histograms and sums by name, as in stun.statistics.store.Statistics. All ranks call this together."""
        return self._dense() | (self._experts() if self.layer.kept else {})

    def _dense(self) -> dict[str, torch.Tensor]:
        rows = sum(len(hidden.flatten(0, -2)) for hidden in self._states.hidden)
        tokens = int(self.ranks.sum_integers(torch.tensor([rows], device=self.ranks.device)))
        counts_NB, sums_N = self._empty(len(self.names))
        for number, name in enumerate(self.names):
            if self.owners[name] == self.ranks.rank:
                norms_D = self.dense[name]["inputs"] / tokens
                self._count(counts_NB[number], sums_N[number], self.layer.dense[name], norms_D, name)
        counts_NB, sums_N = self._together(counts_NB, sums_N)
        totals = {f"outliers of {name}": counts_NB[number].clone() for number, name in enumerate(self.names)}
        return totals | {f"sum of {name}": sums_N[number].clone() for number, name in enumerate(self.names)}

    def _experts(self) -> dict[str, torch.Tensor]:
        layer, tokens_E = self.layer, self.ranks.sum_integers(self.tokens.to(self.ranks.device)).tolist()
        all_experts = pooled(self.experts, self.ranks) if 0 in tokens_E else {}
        counts_EB, sums_E = self._empty(len(layer.kept))
        for number in self.numbers:
            sums, expert = self.experts[number] if tokens_E[number] else all_experts, layer.kept[number]
            for part, squares_D in sums.items():
                norms_D, weight_OD = squares_D / (tokens_E[number] or sum(tokens_E)), layer.experts[expert][part]
                name = f"layer {layer.layout.index} expert {expert} {part}"
                self._count(counts_EB[number], sums_E[number], layer.layout.oriented(weight_OD), norms_D, name)
        counts_EB, sums_E = self._together(counts_EB, sums_E)
        return {"outliers": counts_EB, "outlier_sums": sums_E}

    def _empty(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros for histograms [rows, BINS] and sums [rows]."""
        device = self.ranks.device
        return torch.zeros(rows, BINS, dtype=torch.int64, device=device), torch.zeros(rows, dtype=torch.float64, device=device)

    @staticmethod
    def _count(counts_B: torch.Tensor, sum_: torch.Tensor, weight_OD, squares_D: torch.Tensor, name: str) -> None:
        """Add the scores of one matrix. Raises StunError if one is not finite."""
        scores_OD = wanda_scores(weight_OD, squares_D)
        require_finite(scores_OD, f"{name}: score")
        matrix_counts_B, matrix_sum = score_histogram(scores_OD)
        counts_B += matrix_counts_B
        sum_ += matrix_sum

    def _together(self, counts_NB: torch.Tensor, sums_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts and sums of all ranks; exact, since only one rank has non-zero values in a row."""
        return self.ranks.sum_integers(counts_NB).to(torch.int32), self.ranks.all_gather(sums_N).sum(0)
