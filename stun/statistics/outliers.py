"""Histograms of weight scores in the dense model, per matrix, for OWL's sparsity ratios."""

from collections.abc import Iterator

import torch

from stun.sparsify.ratios import BINS, score_histogram
from stun.sparsify.scores import require_finite, wanda_scores
from stun.statistics.input_moments import Moments, pooled
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream

Scored = tuple[int, torch.Tensor, torch.Tensor, str]  # row of the histograms, matrix, its inputs' mean squares, name in errors


class OutlierCounter(Moments):
    """Observer of one layer; `totals` are histograms of its weights' scores |W_ij| * sqrt(mean over tokens of x_j^2).

    The mean over a matrix' tokens, in place of Wanda's sum, makes experts with many and few tokens comparable. An expert without
    tokens is scored with the inputs of all experts.
    """

    def __init__(self, stream: LayerStream, layer: Layer):
        numbers = [number for number, owner in enumerate(layer.owner) if owner == stream.ranks.rank]
        super().__init__(stream, layer, sorted(layer.layout.linears), numbers, grams=False, gated=False)
        self.rows = dict.fromkeys(self.names, 0)  # of inputs of dense matrices on this rank

    def of_dense(self, name, turn, input_TD):
        self.rows[name] += input_TD.shape[:-1].numel()
        return super().of_dense(name, turn, input_TD)

    def totals(self) -> dict[str, torch.Tensor]:
        """Histograms and sums by name, as in stun.statistics.store.Statistics. All ranks call this together."""
        ranks, dense, rows = self.stream.ranks, len(self.names), len(self.names) + len(self.layer.kept)
        counts_NB = torch.zeros(rows, BINS, dtype=torch.int64, device=ranks.device)
        sums_N = torch.zeros(rows, dtype=torch.float64, device=ranks.device)
        for row, weight_OD, squares_D, name in [*self._dense(), *(self._experts() if self.layer.kept else ())]:
            scores_OD = wanda_scores(weight_OD, squares_D)
            require_finite(scores_OD, f"{name}: score")
            matrix_counts_B, matrix_sum = score_histogram(scores_OD)
            counts_NB[row] += matrix_counts_B
            sums_N[row] += matrix_sum
        # Exact, since only one rank has non-zero values in a row.
        counts_NB, sums_N = ranks.sum_integers(counts_NB).to(torch.int32), ranks.all_gather(sums_N).sum(0)
        totals = {f"outliers of {name}": counts_NB[row].clone() for row, name in enumerate(self.names)}
        totals |= {f"sum of {name}": sums_N[row].clone() for row, name in enumerate(self.names)}
        return totals | ({"outliers": counts_NB[dense:], "outlier_sums": sums_N[dense:]} if self.layer.kept else {})

    def _dense(self) -> Iterator[Scored]:
        """This rank's dense matrices."""
        ranks = self.stream.ranks
        rows_N = torch.tensor(list(self.rows.values()), dtype=torch.int64, device=ranks.device)
        tokens_N = ranks.sum_integers(rows_N).tolist()
        for row, name in enumerate(self.names):
            if self.owners[name] == ranks.rank:
                yield row, self.layer.dense[name], self.dense[name]["inputs"] / tokens_N[row], name

    def _experts(self) -> Iterator[Scored]:
        """The matrices of this rank's experts."""
        layer, ranks = self.layer, self.stream.ranks
        tokens_E = ranks.sum_integers(self.tokens.to(ranks.device)).tolist()
        all_experts = pooled(self.experts, ranks) if 0 in tokens_E else {}
        for number in self.numbers:
            sums, expert = self.experts[number] if tokens_E[number] else all_experts, layer.kept[number]
            for part, squares_D in sums.items():
                weight_OD = layer.layout.oriented(layer.experts[expert][part])
                name = f"layer {layer.layout.index} expert {expert} {part}"
                yield len(self.names) + number, weight_OD, squares_D / (tokens_E[number] or sum(tokens_E)), name
