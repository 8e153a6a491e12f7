"""Scores of experts; those with the highest are kept.

Shapes: E experts; `powers_E33[e, a, beta]` is the sum over expert e's tokens of g^a ||f||^beta, with f its output and g the gate
weight it is multiplied by; a and beta run from 0 to 2, so [e, 0, 0] counts the tokens.
"""

import torch

from stun.config import Score

# (a, b, beta) of S = n^b * mean(g^a ||f||^beta), n the expert's tokens.
PRESETS = {
    Score.reap: (1, 0, 1),  # arXiv 2510.13999, eq. 5
    Score.man: (0, 0, 1),  # arXiv 2606.15716
    Score.msan: (0, 0, 2),  # arXiv 2606.15716
    Score.ean: (0, 1, 1),  # summed instead of averaged
    Score.frequency: (0, 1, 0),
    Score.weighted_frequency: (1, 1, 0),
    Score.energy: (2, 1, 2),  # sum of the squared contribution to the layer's output
}


def _moment_score(powers_E33: torch.Tensor, a: int, b: int, beta: int) -> torch.Tensor:
    """[E] float64 n^b * mean(g^a ||f||^beta); 0 for an expert without tokens."""
    tokens_E = powers_E33[:, 0, 0]  # source weights make it a float, possibly below 1
    some_E = torch.where(tokens_E > 0, tokens_E, 1.0)
    return torch.where(tokens_E > 0, some_E**b * powers_E33[:, a, beta] / some_E, 0.0)


def aimer_score(weights_E3: torch.Tensor) -> torch.Tensor:
    """[E] minus ||w||_1 / (sqrt(N) ||w||_2), from the sum of |w|, the sum of w^2 and N of each expert (arXiv 2603.18492).

    The quotient is largest, 1, if all weights have the same magnitude, as in a dead expert; AIMER removes such experts first.
    """
    absolute_E, squared_E, count_E = weights_E3.double().unbind(1)
    return torch.where(squared_E > 0, -absolute_E / (count_E * squared_E).sqrt(), -1.0)


def random_score(experts: int, layer: int, seed: int) -> torch.Tensor:
    """[E] uniform in [0, 1), the control in comparisons; equal for equal layer and seed."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)
    return torch.rand(experts, generator=generator, dtype=torch.float64)


def residual_score(powers_E33: torch.Tensor, outputs_ED: torch.Tensor) -> torch.Tensor:
    """[E] energy of an expert that no constant output can stand for: sum g^2 ||f||^2 - ||sum g^2 f||^2 / sum g^2, with
    `outputs_ED` the sums of g^2 f (MoNE, arXiv 2507.00390). What is nearly constant, others easily take over."""
    squares_E = powers_E33[:, 2, 0]
    constant_E = outputs_ED.double().square().sum(1) / torch.where(squares_E > 0, squares_E, 1.0)
    return (powers_E33[:, 2, 2] - constant_E).clamp_min(0.0)


def score_experts(
    score: Score,
    powers_E33: torch.Tensor,
    weights_E3: torch.Tensor,
    layer: int,
    seed: int,
    outputs_ED: torch.Tensor | None = None,
) -> torch.Tensor:
    """[E] float64 scores of one layer's experts; the residual one reads `outputs_ED`."""
    if score is Score.residual:
        assert outputs_ED is not None
        return residual_score(powers_E33, outputs_ED)
    if score is Score.aimer:
        return aimer_score(weights_E3)
    if score is Score.random:
        return random_score(len(powers_E33), layer, seed)
    if score is Score.index:
        return torch.zeros(len(powers_E33), dtype=torch.float64)
    return _moment_score(powers_E33, *PRESETS[score])
