"""SparseSwaps: a better mask from any mask, one exchange at a time (arXiv 2512.10922)."""

from __future__ import annotations

import torch

from stun.sparsify.scores import output_error
from stun.sparsify.select import Pattern

CANDIDATES = 32  # a row looks at pairs of so many kept and as many removed weights, those that alone would cost least


def swap(
    weight_OD: torch.Tensor, dense_OD: torch.Tensor, gram_DD: torch.Tensor, most: int, pattern: Pattern | None = None
) -> torch.Tensor:
    """`weight_OD` after up to `most` exchanges a row, each of the pair that lowers the row's output error most.

    A weight that comes back has its value in `dense_OD`. With a pattern, pairs lie within its groups. Weights keep their dtype;
    a row whose error did not fall stays as it was.
    """
    old_OD, dense_OD = weight_OD.to(gram_DD.dtype), dense_OD.to(gram_DD.dtype)
    value_OD, stays_OD = old_OD.clone(), weight_OD != 0
    slope_OD = (dense_OD - value_OD) @ gram_DD
    rows_r = torch.arange(len(value_OD), device=value_OD.device)  # those that still get better
    for _ in range(most):
        own = (matrix_OD[rows_r] for matrix_OD in (value_OD, dense_OD, slope_OD, stays_OD))
        gone_r, back_r, gain_r = _best_pairs(*own, gram_DD, pattern)
        rows_r, gone_r, back_r = (x[gain_r < 0] for x in (rows_r, gone_r, back_r))
        if not len(rows_r):
            break
        slope_OD[rows_r] += value_OD[rows_r, gone_r, None] * gram_DD[gone_r] - dense_OD[rows_r, back_r, None] * gram_DD[back_r]
        value_OD[rows_r, gone_r], value_OD[rows_r, back_r] = 0, dense_OD[rows_r, back_r]
        stays_OD[rows_r, gone_r], stays_OD[rows_r, back_r] = False, True
    fell_O = output_error(dense_OD - value_OD, gram_DD) < output_error(dense_OD - old_OD, gram_DD)
    return torch.where(fell_O[:, None], value_OD, old_OD).to(weight_OD.dtype)


def _best_pairs(value_OD, dense_OD, slope_OD, stays_OD, gram_DD, pattern: Pattern | None):
    """For every row: the kept weight to remove, the removed one to bring back, and the change of the row's error, [O] each.

    With r = dense - value the error is r G r^T. Removing u and bringing back p changes it by
    2 v_u (G r)_u + v_u^2 G_uu - 2 w_p (G r)_p + w_p^2 G_pp - 2 v_u w_p G_up.
    """
    diagonal_D = gram_DD.diagonal()
    removal_OD = (2 * value_OD * slope_OD + value_OD.square() * diagonal_D).masked_fill(~stays_OD, torch.inf)
    return_OD = (dense_OD.square() * diagonal_D - 2 * dense_OD * slope_OD).masked_fill(stays_OD | (dense_OD == 0), torch.inf)
    if pattern:
        columns = torch.arange(len(gram_DD), device=gram_DD.device).view(1, -1, pattern.of).expand(len(value_OD), -1, -1)
        kept_OGC, lost_OGC = columns, columns
    else:
        width = min(CANDIDATES, len(gram_DD))
        kept_OGC = removal_OD.topk(width, largest=False).indices[:, None]
        lost_OGC = return_OD.topk(width, largest=False).indices[:, None]

    def at(matrix_OD: torch.Tensor, place_OGC: torch.Tensor) -> torch.Tensor:
        return matrix_OD.gather(1, place_OGC.flatten(1)).view(place_OGC.shape)

    alone_OGCC = at(removal_OD, kept_OGC)[..., :, None] + at(return_OD, lost_OGC)[..., None, :]
    product_OGCC = at(value_OD, kept_OGC)[..., :, None] * at(dense_OD, lost_OGC)[..., None, :]
    gain_OGCC = alone_OGCC - 2 * product_OGCC * gram_DD[kept_OGC[..., :, None], lost_OGC[..., None, :]]
    gain_ON = gain_OGCC.flatten(1)
    best_O = gain_ON.argmin(1, keepdim=True)
    width = kept_OGC.shape[2]
    kept_O = kept_OGC.flatten(1).gather(1, best_O // width).squeeze(1)
    lost_O = lost_OGC.flatten(1).gather(1, best_O // width**2 * width + best_O % width).squeeze(1)
    return kept_O, lost_O, gain_ON.gather(1, best_O).squeeze(1)
