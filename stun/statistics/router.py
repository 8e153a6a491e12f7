"""Distances between the rows of a router's matrix."""

import torch


def router_distance(router_ED: torch.Tensor) -> torch.Tensor:
    """[E, E] float64 ||W_i - W_j|| of the router's rows (STUN, eq. 8)."""
    router_ED = router_ED.double()
    # The form by matrix product loses the digits of small distances.
    return torch.cdist(router_ED, router_ED, compute_mode="donot_use_mm_for_euclid_dist")
