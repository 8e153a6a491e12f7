"""Accumulators of calibration statistics, one sum per calibration source.

Shapes: T tokens, D inputs, E experts, K top-k, N = T * K, S calibration sources. Sums are integers, whose order does not matter,
or float64 in the order of the calls, so the same calls give the same bits. Nothing is reduced over all elements at once: torch
splits such a sum by the number of threads, but not a sum over rows.
"""

import math

import torch

_SQUARED, _LARGE_SQUARED = 1 << 17, 1 << 25  # entries squared per block on a CPU (as many as fit in a core's cache) and a GPU


class CoActivation:
    """Number of tokens routed to both of two experts, for any top-k: hit.T @ hit with hit [T, E] in {0, 1} (STUN, eq. 8)."""

    def __init__(self, sources: int, num_experts: int, device: torch.device | str = "cpu"):
        self.counts_SEE = torch.zeros(sources, num_experts, num_experts, dtype=torch.int64, device=device)

    def add(self, source: int, index_TK: torch.Tensor) -> None:
        """Count the chosen experts of T tokens; the diagonal counts the tokens of each expert."""
        hit_TE = torch.zeros(len(index_TK), self.counts_SEE.shape[1], device=index_TK.device)
        hit_TE.scatter_(1, index_TK, 1.0)
        self.counts_SEE[source] += (hit_TE.T @ hit_TE).to(torch.int64)


def norms(output_TKD: torch.Tensor) -> torch.Tensor:
    """[T, K] norms of K vectors per token, from the diagonal of their inner products."""
    return torch.bmm(output_TKD, output_TKD.mT).diagonal(dim1=1, dim2=2).sqrt()


class OutputPowers:
    """Sums over an expert's tokens of g^a ||f||^beta for a and beta from 0 to 2, with f the expert's output and g its gate
    weight, and the largest ||f||."""

    def __init__(self, sources: int, num_experts: int, device: torch.device | str = "cpu"):
        self.sums_SE33 = torch.zeros(sources, num_experts, 3, 3, dtype=torch.float64, device=device)
        self.peak_SE = torch.zeros(sources, num_experts, dtype=torch.float64, device=device)

    def reduce(self, index_TK: torch.Tensor, gate_TK: torch.Tensor, norm_TK: torch.Tensor) -> torch.Tensor:
        """[E, 10] nine sums and the largest norm of T tokens, from their experts, gate weights and norms of expert outputs."""
        experts, index_N = self.peak_SE.shape[1], index_TK.flatten()
        gate_N3, norm_N3 = (torch.linalg.vander(x_TK.flatten().double(), N=3) for x_TK in (gate_TK, norm_TK))
        power_N9, place_9 = (gate_N3[:, :, None] * norm_N3[:, None, :]).flatten(1), torch.arange(9, device=index_N.device)
        sums_X = _sums_by(index_N[:, None] * 9 + place_9, power_N9, 9 * experts)
        peak_E = torch.zeros(experts, dtype=torch.float64, device=index_N.device)
        return torch.cat([sums_X.view(-1, 9), peak_E.scatter_reduce_(0, index_N, norm_N3[:, 1], "amax")[:, None]], 1)

    def add(self, source: int, sums_EX: torch.Tensor) -> None:
        """Add the result of `reduce` for one micro-batch."""
        self.sums_SE33[source] += sums_EX[:, :9].view(-1, 3, 3)
        self.peak_SE[source] = torch.maximum(self.peak_SE[source], sums_EX[:, 9])


def _sums_by(place: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """[size] sums of the values at each place, in their order. On a GPU only index_put_ has a fixed order, since it sorts."""
    sums, place, values = values.new_zeros(size), place.flatten(), values.flatten()
    return sums.index_put_((place,), values, accumulate=True) if sums.is_cuda else sums.index_add_(0, place, values)


def weight_sums(parts: list[torch.Tensor]) -> tuple[float, float, int]:
    """Sum of |w|, sum of w^2 and number of the weights of an expert; summed by row, then exactly."""
    sums = []
    for part in map(torch.atleast_2d, parts):
        for rows in _blocks(part):
            weights = rows.float()
            sums.append(torch.stack([weights.abs().sum(1), weights.square().sum(1)]))
    absolute, squared = torch.cat(sums, 1).tolist()  # together: a GPU is waited for once
    return math.fsum(absolute), math.fsum(squared), sum(part.numel() for part in parts)


def _blocks(rows_ND: torch.Tensor, least: int = 1) -> tuple[torch.Tensor, ...]:
    """Blocks of rows that are squared at once, `least` or more."""
    return rows_ND.split(max(least, (_LARGE_SQUARED if rows_ND.is_cuda else _SQUARED) // rows_ND.shape[1]))


def add_squares(sum_D: torch.Tensor | None, x_TD: torch.Tensor) -> torch.Tensor:
    """`sum_D` plus `squared_sum` of x, in place; None is zeros."""
    if not x_TD.is_cuda:
        part_D = squared_sum(x_TD)
        return part_D if sum_D is None else sum_D.add_(part_D)
    # Two launches, which reads bfloat16 once: with few tokens an expert, launches bound a GPU.
    norm_D = torch.linalg.vector_norm(x_TD, dim=0, dtype=torch.float32)
    return (torch.zeros_like(norm_D, dtype=torch.float64) if sum_D is None else sum_D).addcmul_(norm_D, norm_D)


def squared_sum(x_TD: torch.Tensor) -> torch.Tensor:
    """[D] float64 sums of squares of the columns: the square of Wanda's ||X_j||_2 (arXiv 2306.11695)."""
    sum_D = torch.zeros(x_TD.shape[1], dtype=torch.float64, device=x_TD.device)
    for x_tD in _blocks(x_TD, least=16):
        sum_D += x_tD.float().square().sum(0)
    return sum_D
