"""Pure accumulators of calibration statistics.

Shapes: T tokens, n tokens of one expert, D hidden, I expert width, E experts, K top-k. Sums are kept in float64 and added in
the order of the calls, so the same calls give the same bits. No reduction here runs over all elements at once: torch splits
such sums by thread count, while a sum over rows does not depend on it.
"""

from __future__ import annotations

import torch


class CoActivation:
    """How often two experts serve the same token, for any top-k: hit.T @ hit with hit [T, E] in {0, 1} (STUN, eq. 8)."""

    def __init__(self, num_experts: int, device: torch.device | str = "cpu"):
        self.counts_EE = torch.zeros(num_experts, num_experts, dtype=torch.int64, device=device)

    def add(self, index_TK: torch.Tensor) -> None:
        """Count the chosen experts of T tokens; the diagonal holds how often each expert was chosen."""
        hit_TE = torch.zeros(len(index_TK), len(self.counts_EE), device=index_TK.device)
        hit_TE.scatter_(1, index_TK, 1.0)
        self.counts_EE += (hit_TE.T @ hit_TE).to(torch.int64)


class OutputNorms:
    """Per expert: tokens, sum of g, of g ||f||, of ||f||, of ||f||^2, with f the expert's output and g its gate weight.

    REAP (arXiv 2510.13999, eq. 5) is the third over the first, MSAN (arXiv 2606.15716) the fifth over the first.
    """

    COLUMNS = ("tokens", "gate", "gated_norm", "norm", "squared_norm")

    def __init__(self, num_experts: int, device: torch.device | str = "cpu"):
        self.sums_E5 = torch.zeros(num_experts, len(self.COLUMNS), dtype=torch.float64, device=device)

    def add(self, expert: int, output_nD: torch.Tensor, gate_n: torch.Tensor) -> None:
        """Add the tokens of one expert from one micro-batch."""
        norm_n = output_nD.float().norm(dim=-1).double()
        gate_n = gate_n.double()
        columns = (torch.ones_like(norm_n), gate_n, gate_n * norm_n, norm_n, norm_n.square())
        self.sums_E5[expert] += torch.stack(columns, dim=1).sum(0)


def saliency(sums_E5: torch.Tensor, kind: str) -> torch.Tensor:
    """[E] mean over an expert's tokens: kind 'reap' of g ||f||, 'msan' of ||f||^2; 0 for an expert without tokens."""
    column = {"reap": "gated_norm", "msan": "squared_norm"}[kind]
    tokens_E = sums_E5[:, 0]
    return sums_E5[:, OutputNorms.COLUMNS.index(column)] / tokens_E.clamp(min=1)


def squared_sum(x_TD: torch.Tensor) -> torch.Tensor:
    """[D] sum of squares of each column, float64: the square of Wanda's ||X_j||_2."""
    return x_TD.float().square().sum(0).double()
