"""ALPS: the support by ADMM, then the values on it by conjugate gradients (Meng et al., NeurIPS 2024, arXiv 2406.07831)."""

from __future__ import annotations

import torch

from stun.runtime.threads import one_thread
from stun.sparsify.refit import conjugate_gradient
from stun.sparsify.scores import unit_norm
from stun.sparsify.select import Pattern, smallest_of_matrix, smallest_of_pattern

ROUNDS, CHECK_EVERY, SETTLED_AFTER = 300, 3, 30
REFIT_STEPS = 10


def alps(weight_OD: torch.Tensor, gram_DD: torch.Tensor, total: int, pattern: Pattern | None = None) -> torch.Tensor:
    """The pruned and refitted weights [O, D], of which `total` are zero, in the dtype of the Gram matrix.

    Inputs are scaled to unit norm first; weights are compared over the whole matrix, or within the groups of the pattern.
    """
    gram_DD, norm_D = unit_norm(gram_DD)
    dense_OD = weight_OD.to(gram_DD.dtype) * norm_D
    wanted_OD = dense_OD @ gram_DD
    sparse_OD = _support(dense_OD, gram_DD, wanted_OD, total, pattern)
    return conjugate_gradient(sparse_OD, gram_DD, wanted_OD, REFIT_STEPS) / norm_D


def _project(value_OD: torch.Tensor, total: int, pattern: Pattern | None) -> torch.Tensor:
    """The nearest matrix with `total` zeros."""
    scores_OD = value_OD.square()
    mask_OD = smallest_of_pattern(scores_OD, pattern) if pattern else smallest_of_matrix(scores_OD, total)
    return value_OD.masked_fill(mask_OD, 0)


def _support(
    dense_OD: torch.Tensor, gram_DD: torch.Tensor, wanted_OD: torch.Tensor, total: int, pattern: Pattern | None
) -> torch.Tensor:
    """ADMM with the penalty's published schedule (section 3.2 and the authors' code): rho grows by 1.3, 1.2 or 1.1 as the
    support changes by more than 10 %, 0.5 % or at all; as long as it never moved, rho was too large and is divided by 5."""
    with one_thread():
        values_D, vectors_DD = torch.linalg.eigh(gram_DD)
    stay = max(1, dense_OD.numel() - total)
    rho, moved = 0.1, False
    start_OD = _project(dense_OD, total, pattern)
    sparse_OD, dual_OD = start_OD, torch.zeros_like(dense_OD)
    before_OD = sparse_OD == 0
    inverse_DD = (vectors_DD / (values_D + rho)) @ vectors_DD.T
    for number in range(1, ROUNDS + 1):
        value_OD = (wanted_OD - dual_OD + rho * sparse_OD) @ inverse_DD
        sparse_OD = _project(value_OD + dual_OD / rho, total, pattern)
        dual_OD = dual_OD + rho * (value_OD - sparse_OD)
        if number % CHECK_EVERY:
            continue
        now_OD = sparse_OD == 0
        changed = int((now_OD != before_OD).sum())
        before_OD = now_OD
        if changed > 0.005 * stay:
            rho, moved = rho * (1.3 if changed > 0.1 * stay else 1.2), True
        elif changed and moved:
            rho *= 1.1
        elif moved:
            break
        else:
            rho /= 5
            if changed:
                sparse_OD, dual_OD = start_OD, torch.zeros_like(dense_OD)
        rho = min(rho, 1e6)
        inverse_DD = (vectors_DD / (values_D + rho)) @ vectors_DD.T
        if number >= SETTLED_AFTER and changed < 0.0003 * stay:
            break
    return _project(value_OD, total, pattern)
