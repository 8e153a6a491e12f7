"""Distances between the experts of a layer: [E, E], symmetric; the diagonal is 0 and unused."""

import numpy as np
import torch


def expert_distance(
    router_EE: torch.Tensor,
    coactivation_EE: torch.Tensor | None = None,
    lambda1: float = 1.0,
    lambda2: float = 0.0,
) -> np.ndarray:
    """[E, E] distance lambda1 ||W_i - W_j|| - lambda2 a_ij / mean(a), the negated similarity of STUN, eq. 8.

    a counts the tokens routed to both experts, its mean runs over the pairs i != j.
    """
    distance_EE = lambda1 * router_EE.double()
    experts = len(distance_EE)
    if coactivation_EE is not None and lambda2:
        pairs_EE = coactivation_EE.double().clone().fill_diagonal_(0)
        mean = pairs_EE.sum() / max(1, experts * (experts - 1))
        distance_EE = distance_EE - lambda2 * pairs_EE / mean if mean > 0 else distance_EE
    return distance_EE.clone().fill_diagonal_(0).numpy()
