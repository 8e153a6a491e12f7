"""Pure accumulators of calibration statistics, kept apart for every calibration source.

Shapes: T tokens, n tokens of one expert, D hidden, I expert width, E experts, K top-k, S calibration sources. Sums are kept in
float64 and added in the order of the calls, or as integers, whose order does not matter; so the same calls give the same bits.
No reduction here runs over all elements at once: torch splits such sums by thread count, while a sum over rows does not depend
on it.
"""

from __future__ import annotations

import math

import torch

COSINE_UNIT = 2**30  # cosines are summed as multiples of 1 / COSINE_UNIT
_TINY = 1e-12  # norm from which an output has a direction
_SQUARED = 1 << 17  # entries squared at once: on a CPU as many as stay in a core's cache


class CoActivation:
    """How often two experts serve the same token, for any top-k: hit.T @ hit with hit [T, E] in {0, 1} (STUN, eq. 8)."""

    def __init__(self, sources: int, num_experts: int, device: torch.device | str = "cpu"):
        self.counts_SEE = torch.zeros(sources, num_experts, num_experts, dtype=torch.int64, device=device)

    def add(self, source: int, index_TK: torch.Tensor) -> None:
        """Count the chosen experts of T tokens; the diagonal holds how often each expert was chosen."""
        hit_TE = torch.zeros(len(index_TK), self.counts_SEE.shape[1], device=index_TK.device)
        hit_TE.scatter_(1, index_TK, 1.0)
        self.counts_SEE[source] += (hit_TE.T @ hit_TE).to(torch.int64)


class Agreement:
    """Sum, over the tokens two experts share, of the cosine of their outputs, in units of 1 / COSINE_UNIT."""

    def __init__(self, sources: int, num_experts: int, device: torch.device | str = "cpu"):
        self.sums_SEE = torch.zeros(sources, num_experts, num_experts, dtype=torch.int64, device=device)

    def add(self, source: int, index_TK: torch.Tensor, product_TKK: torch.Tensor) -> None:
        """Add T tokens, the outputs of whose K experts have these inner products."""
        norm_TK = norms(product_TKK).clamp_min(_TINY)
        cosine_TKK = (product_TKK / norm_TK[:, :, None] / norm_TK[:, None, :]).double()
        place_TKK = index_TK[:, :, None] * self.sums_SEE.shape[1] + index_TK[:, None, :]
        units_TKK = cosine_TKK.mul_(COSINE_UNIT).round_().long()
        self.sums_SEE[source].view(-1).index_add_(0, place_TKK.flatten(), units_TKK.flatten())


def norms(product_TKK: torch.Tensor) -> torch.Tensor:
    """[T, K] norms of K vectors a token, from their inner products."""
    return product_TKK.diagonal(dim1=1, dim2=2).sqrt()


class OutputPowers:
    """Per expert, the sums over its tokens of g^a ||f||^beta for a and beta from 0 to 2, with f the expert's output and g its
    gate weight, of every micro-batch by itself (`sums`, [E, 3, 3] each), and the largest ||f||."""

    def __init__(self, sources: int, num_experts: int, device: torch.device | str = "cpu"):
        self.sums: list[torch.Tensor] = []
        self.peak_SE = torch.zeros(sources, num_experts, device=device)

    def add(self, source: int, index_TK: torch.Tensor, gate_TK: torch.Tensor, norm_TK: torch.Tensor) -> None:
        """Add a micro-batch of T tokens with their K experts, these experts' gate weights, and the norms of their outputs."""
        index_N, order_N = index_TK.flatten().sort(stable=True)
        gate_N3, norm_N3 = (torch.linalg.vander(own_TK.flatten()[order_N].double(), N=3) for own_TK in (gate_TK, norm_TK))
        power_N9 = (gate_N3[:, :, None] * norm_N3[:, None, :]).flatten(1)
        count_E = torch.bincount(index_N, minlength=self.peak_SE.shape[1])
        self.sums.append(torch.segment_reduce(power_N9, "sum", lengths=count_E, initial=0).view(-1, 3, 3))
        self.peak_SE[source].scatter_reduce_(0, index_TK.flatten(), norm_TK.flatten(), "amax")


def weight_sums(parts: list[torch.Tensor]) -> tuple[float, float, int]:
    """Sum of |w|, sum of w^2 and number of the weights of an expert; summed by row and then exactly."""
    absolute, squared = [], []
    for part in map(torch.atleast_2d, parts):
        for rows in part.split(max(1, _SQUARED // part.shape[1])):
            absolute += rows.float().abs().sum(1).tolist()
            squared += rows.float().square().sum(1).tolist()
    return math.fsum(absolute), math.fsum(squared), sum(part.numel() for part in parts)


def squared_sum(x_TD: torch.Tensor) -> torch.Tensor:
    """[D] sum of squares of each column, float64: the square of Wanda's ||X_j||_2."""
    sum_D = torch.zeros(x_TD.shape[1], dtype=torch.float64, device=x_TD.device)
    size = max(16, (_SQUARED if x_TD.device.type == "cpu" else 256 * _SQUARED) // x_TD.shape[1])
    for x_tD in x_TD.split(size):
        sum_D += x_tD.float().square().sum(0)
    return sum_D
