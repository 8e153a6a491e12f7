"""ALPS: ADMM chooses the non-zero entries, conjugate gradients fit their values (Meng et al., NeurIPS 2024, arXiv 2406.07831)."""

from collections.abc import Callable

import torch

from stun.runtime.matmul import product
from stun.runtime.threads import one_thread
from stun.sparsify.refit import conjugate_gradient
from stun.sparsify.scores import unit_norm
from stun.sparsify.select import Pattern, smallest_of_matrix, smallest_of_pattern

ROUNDS, CHECK_EVERY, SETTLED_AFTER = 300, 3, 30
REFIT_STEPS = 10


def alps(weight_OD: torch.Tensor, gram_DD: torch.Tensor, total: int, pattern: Pattern | None = None) -> torch.Tensor:
    """Pruned and refitted weights [O, D] with `total` zeros, in the dtype of the Gram matrix.

    Inputs are scaled to unit norm first. Weights compete over the whole matrix, or within the groups of the pattern.
    """
    gram_DD, norm_D = unit_norm(gram_DD)
    dense_OD = weight_OD.to(gram_DD.dtype) * norm_D
    wanted_OD = product(dense_OD, gram_DD)
    sparse_OD = _support(dense_OD, gram_DD, wanted_OD, total, pattern)
    return conjugate_gradient(sparse_OD, gram_DD, wanted_OD, REFIT_STEPS) / norm_D


def _project(value_OD: torch.Tensor, total: int, pattern: Pattern | None) -> torch.Tensor:
    """Nearest matrix with `total` zeros."""
    scores_OD = value_OD.square()
    mask_OD = smallest_of_pattern(scores_OD, pattern) if pattern else smallest_of_matrix(scores_OD, total)
    return value_OD.masked_fill(mask_OD, 0)


def _support(
    dense_OD: torch.Tensor, gram_DD: torch.Tensor, wanted_OD: torch.Tensor, total: int, pattern: Pattern | None
) -> torch.Tensor:
    """ADMM with the published schedule of the penalty rho (section 3.2 and the authors' code): rho grows by 1.3, 1.2 or 1.1 if
    the support changes by more than 10 %, 0.5 % or at all. Until its first change, rho is too large and is divided by 5."""
    inverse = (_by_cholesky if gram_DD.is_cuda else _by_eigenvectors)(gram_DD)
    kept = max(1, dense_OD.numel() - total)
    rho, moved = 0.1, False
    start_OD = _project(dense_OD, total, pattern)
    sparse_OD, dual_OD = start_OD, torch.zeros_like(dense_OD)
    old_OD = sparse_OD == 0
    inverse_DD = inverse(rho)
    for step in range(1, ROUNDS + 1):
        value_OD = product(wanted_OD - dual_OD + rho * sparse_OD, inverse_DD)
        sparse_OD = _project(value_OD + dual_OD / rho, total, pattern)
        dual_OD = dual_OD + rho * (value_OD - sparse_OD)
        if step % CHECK_EVERY:
            continue
        new_OD = sparse_OD == 0
        changed = int((new_OD != old_OD).sum())
        old_OD = new_OD
        if changed > 0.005 * kept:
            rho, moved = rho * (1.3 if changed > 0.1 * kept else 1.2), True
        elif changed and moved:
            rho *= 1.1
        elif moved:
            break
        else:
            rho /= 5
            if changed:
                sparse_OD, dual_OD = start_OD, torch.zeros_like(dense_OD)
        if step >= SETTLED_AFTER and changed < 0.0003 * kept:
            break
        rho = min(rho, 1e6)
        inverse_DD = inverse(rho)
    return _project(value_OD, total, pattern)


def _by_eigenvectors(gram_DD: torch.Tensor) -> Callable[[float], torch.Tensor]:
    """(G + rho I)^-1 [D, D] of any rho."""
    with one_thread():  # the last bits of LAPACK's results depend on its threads
        values_D, vectors_DD = torch.linalg.eigh(gram_DD)
    return lambda rho: (vectors_DD / (values_D + rho)) @ vectors_DD.T


def _by_cholesky(gram_DD: torch.Tensor) -> Callable[[float], torch.Tensor]:
    """The same; on a GPU eigenvectors take as long as hundreds of factors."""

    def inverse(rho: float) -> torch.Tensor:
        shifted_DD = gram_DD.clone()
        shifted_DD.diagonal().add_(rho)
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted_DD).L)  # without waiting to check: it is damped

    return inverse
