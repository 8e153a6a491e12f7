"""Rounding of a matrix column by column, in which later columns make up for the error (GPTQ, arXiv 2210.17323)."""

from collections.abc import Callable

import torch

from stun.runtime.threads import one_thread

BLOCK = 128


def inverted(factor_DD: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor [D, D] of the inverse of a damped Gram matrix, of which `factor_DD` is the lower one."""
    with one_thread():  # the last bits of LAPACK's results depend on its threads
        return torch.linalg.cholesky(torch.cholesky_inverse(factor_DD.double()), upper=True).float()


def compensated(
    weight_OD: torch.Tensor, upper_DD: torch.Tensor, nearest: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Rounded weights [O, D] in float32, whose outputs are near those of `weight_OD`; its zeros stay zero.

    `upper_DD` is `inverted` of the inputs' Gram matrix; `nearest(column, values_O)` rounds values of one column.
    """
    weight_OD, kept_OD = weight_OD.float().clone(), weight_OD != 0
    for start in range(0, weight_OD.shape[1], BLOCK):
        columns = range(start, min(start + BLOCK, weight_OD.shape[1]))
        errors = []
        for column in columns:
            rounded_O = nearest(column, weight_OD[:, column]) * kept_OD[:, column]
            errors.append((weight_OD[:, column] - rounded_O) / upper_DD[column, column])
            weight_OD[:, column : columns.stop] -= errors[-1][:, None] * upper_DD[column, column : columns.stop]
            weight_OD[:, column] = rounded_O
        weight_OD[:, columns.stop :] -= torch.stack(errors, 1) @ upper_DD[start : columns.stop, columns.stop :]
    return weight_OD
