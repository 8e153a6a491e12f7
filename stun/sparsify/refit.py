"""Least-squares refit of the kept weights under a fixed mask."""

import torch

from stun.runtime.matmul import product
from stun.sparsify.scores import damped, output_error

STEPS = 20


def conjugate_gradient(weight_OD: torch.Tensor, gram_DD: torch.Tensor, target_OD: torch.Tensor, steps: int) -> torch.Tensor:
    """Rows v [O, D] that minimise v G v^T / 2 - v t^T over the non-zero entries of `weight_OD`, where the search starts: `steps`
    of conjugate gradients, preconditioned by the diagonal (ALPS, arXiv 2406.07831, algorithm 2)."""
    kept_OD = weight_OD != 0
    value_OD, scale_D = weight_OD.clone(), gram_DD.diagonal().clamp(min=torch.finfo(gram_DD.dtype).tiny)
    residual_OD = (target_OD - product(value_OD, gram_DD)) * kept_OD
    step_OD = residual_OD / scale_D
    product_O = (residual_OD * step_OD).sum(1)
    for _ in range(steps):
        gram_step_OD = product(step_OD, gram_DD)
        size_O = _ratio(product_O, (step_OD * gram_step_OD).sum(1))
        value_OD += size_O[:, None] * step_OD
        residual_OD -= size_O[:, None] * gram_step_OD * kept_OD
        scaled_OD = residual_OD / scale_D
        old_O, product_O = product_O, (residual_OD * scaled_OD).sum(1)
        step_OD = scaled_OD + _ratio(product_O, old_O)[:, None] * step_OD
    return value_OD


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / denominator.where(denominator > 0, 1), 0)


def refit(
    weight_OD: torch.Tensor,
    dense_OD: torch.Tensor,
    gram_DD: torch.Tensor,
    cross_OD: torch.Tensor | None = None,
    steps: int = STEPS,
) -> torch.Tensor:
    """Weights [O, D] in the dtype of `weight_OD`, with the same zeros and outputs nearer to the target (arXiv 2510.14444).

    The target is the output of `dense_OD` on the same inputs or, with `cross_OD` [O, D] = sum of y x^T, any outputs y. A row
    changes only if this lowers its error, measured after rounding and without damping.
    """
    old_OD, dense_OD = weight_OD.to(gram_DD.dtype), dense_OD.to(gram_DD.dtype)
    target_OD = product(dense_OD, gram_DD) if cross_OD is None else cross_OD
    damped_DD = damped(gram_DD)
    damped_target_OD = target_OD + dense_OD * (damped_DD - gram_DD).diagonal()
    new_OD = conjugate_gradient(old_OD, damped_DD, damped_target_OD, steps).to(weight_OD.dtype).to(gram_DD.dtype)
    change_OD = new_OD - old_OD
    rise_O = output_error(change_OD, gram_DD) + 2 * (change_OD * (product(old_OD, gram_DD) - target_OD)).sum(1)
    return torch.where((rise_O < 0)[:, None], new_OD, old_OD).to(weight_OD.dtype)
