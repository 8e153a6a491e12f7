"""How alike two experts are: [E, E] distances, symmetric, diagonal 0 and unused."""

from __future__ import annotations

import numpy as np
import torch


def mean_cosine(agreement_EE: torch.Tensor, coactivation_EE: torch.Tensor) -> torch.Tensor:
    """[E, E] mean cosine of two experts' outputs over the tokens both serve; 0 where they share none."""
    shared_EE = coactivation_EE.double()  # weighed, so perhaps a fraction of one
    return agreement_EE.double() / torch.where(shared_EE > 0, shared_EE, 1.0)


def expert_distance(
    router_EE: torch.Tensor,
    coactivation_EE: torch.Tensor | None = None,
    agreement_EE: torch.Tensor | None = None,
    lambda1: float = 1.0,
    lambda2: float = 0.0,
    lambda3: float = 0.0,
) -> np.ndarray:
    """[E, E] distance lambda1 ||W_i - W_j|| - lambda2 a_ij / mean(a) - lambda3 cos_ij, the negated similarity of STUN, eq. 8,
    and a third term for alike outputs.

    a counts the tokens routed to both experts, its mean runs over the pairs i != j; `agreement_EE` sums the cosines of their
    outputs on these tokens.
    """
    distance_EE = lambda1 * router_EE.double()
    experts = len(distance_EE)
    if coactivation_EE is not None and lambda2:
        pairs_EE = coactivation_EE.double().clone().fill_diagonal_(0)
        mean = pairs_EE.sum() / max(1, experts * (experts - 1))
        distance_EE = distance_EE - lambda2 * pairs_EE / mean if mean > 0 else distance_EE
    if agreement_EE is not None and lambda3:
        distance_EE = distance_EE - lambda3 * mean_cosine(agreement_EE, coactivation_EE)
    return distance_EE.clone().fill_diagonal_(0).numpy()
