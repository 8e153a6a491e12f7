"""Better values for the weights that stay, the mask given."""

from __future__ import annotations

import torch

from stun.sparsify.scores import damped, output_error


def conjugate_gradient(weight_OD: torch.Tensor, gram_DD: torch.Tensor, target_OD: torch.Tensor, steps: int) -> torch.Tensor:
    """Minimise v G v^T / 2 - v t^T for every row v by `steps` of preconditioned conjugate gradients, from `weight_OD`, over its
    non-zero entries (ALPS, arXiv 2406.07831, algorithm 2)."""
    stays_OD = weight_OD != 0
    value_OD, scale_D = weight_OD.clone(), gram_DD.diagonal().clamp(min=torch.finfo(gram_DD.dtype).tiny)
    residual_OD = (target_OD - value_OD @ gram_DD) * stays_OD
    step_OD = residual_OD / scale_D
    product_O = (residual_OD * step_OD).sum(1)
    for _ in range(steps):
        image_OD = step_OD @ gram_DD
        length_O = _ratio(product_O, (step_OD * image_OD).sum(1))
        value_OD += length_O[:, None] * step_OD
        residual_OD -= length_O[:, None] * image_OD * stays_OD
        scaled_OD = residual_OD / scale_D
        before_O, product_O = product_O, (residual_OD * scaled_OD).sum(1)
        step_OD = scaled_OD + _ratio(product_O, before_O)[:, None] * step_OD
    return value_OD


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    return torch.where(below > 0, above / below.where(below > 0, 1), 0)


def refit(
    weight_OD: torch.Tensor,
    dense_OD: torch.Tensor,
    gram_DD: torch.Tensor,
    cross_OD: torch.Tensor | None = None,
    steps: int = 20,
) -> torch.Tensor:
    """Kept values, in the dtype of `weight_OD`, that bring the matrix's outputs nearer to those wanted (arXiv 2510.14444).

    Wanted are the outputs of `dense_OD` on the same inputs, or, with `cross_OD` [O, D] = sum of y x^T, any outputs y. A row
    changes only where its error, damping aside and after rounding, falls.
    """
    old_OD, dense_OD = weight_OD.to(gram_DD.dtype), dense_OD.to(gram_DD.dtype)
    wanted_OD = dense_OD @ gram_DD if cross_OD is None else cross_OD
    damped_DD = damped(gram_DD)
    towards_OD = wanted_OD + dense_OD @ (damped_DD - gram_DD)
    new_OD = conjugate_gradient(old_OD, damped_DD, towards_OD, steps).to(weight_OD.dtype).to(gram_DD.dtype)
    change_OD = new_OD - old_OD
    rise_O = output_error(change_OD, gram_DD) + 2 * (change_OD * (old_OD @ gram_DD - wanted_OD)).sum(1)
    return torch.where((rise_O < 0)[:, None], new_OD, old_OD).to(weight_OD.dtype)
