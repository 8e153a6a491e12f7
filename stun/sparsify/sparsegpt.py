"""SparseGPT: columns are pruned in turn, later columns compensate for the error (Frantar and Alistarh, ICML 2023)."""

import torch

from stun.runtime.threads import one_thread
from stun.sparsify.scores import unit_norm
from stun.sparsify.select import Pattern, quotas, smallest_of_matrix, smallest_of_pattern

BLOCK = 128


def sparsegpt(weight_OD: torch.Tensor, gram_DD: torch.Tensor, total: int, pattern: Pattern | None = None) -> torch.Tensor:
    """Pruned and updated weights [O, D] with `total` zeros, in the dtype of the Gram matrix (algorithm 1).

    As in the published code, each block of 128 columns has its share of `total`, and its weights compete over all rows.
    """
    gram_DD, norm_D = unit_norm(gram_DD)  # same result, better conditioned factors
    weight_OD = weight_OD.to(gram_DD.dtype) * norm_D
    columns = weight_OD.shape[1]
    with one_thread():  # the last bits of LAPACK's results depend on its threads
        inverse_DD = torch.cholesky_inverse(torch.linalg.cholesky(gram_DD))
        upper_DD = torch.linalg.cholesky(inverse_DD, upper=True)
    width = BLOCK - BLOCK % pattern.of if pattern else BLOCK
    blocks = [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
    shares = quotas([len(weight_OD) * (block.stop - block.start) for block in blocks], total)
    for block, share in zip(blocks, shares, strict=True):
        error_OB = _prune_block(weight_OD[:, block], upper_DD[block, block], share, pattern)
        weight_OD[:, block.stop :] -= error_OB @ upper_DD[block, block.stop :]
    return weight_OD / norm_D


def _prune_block(weight_OB: torch.Tensor, upper_BB: torch.Tensor, share: int, pattern: Pattern | None) -> torch.Tensor:
    """Prune the columns of one block in place; returns the scaled errors [O, B] that later blocks compensate."""
    scale_B = upper_BB.diagonal()
    if not pattern:
        return _prune_columns(weight_OB, upper_BB, smallest_of_matrix((weight_OB / scale_B).square(), share))
    # A group's mask is chosen when the block arrives at it: earlier columns have changed its weights by then.
    errors = []
    for start in range(0, weight_OB.shape[1], pattern.of):
        group = slice(start, start + pattern.of)
        mask_OG = smallest_of_pattern((weight_OB[:, group] / scale_B[group]).square(), pattern)
        errors.append(_prune_columns(weight_OB[:, start:], upper_BB[start:, start:], mask_OG))
    return torch.cat(errors, 1)


def _prune_columns(weight_OB: torch.Tensor, upper_BB: torch.Tensor, mask_OG: torch.Tensor) -> torch.Tensor:
    """Prune the first G of B columns in place, and change those after them; returns the scaled errors [O, G]."""
    return (_by_outer_products if weight_OB.is_cuda else _column_by_column)(weight_OB, upper_BB, mask_OG)


def _column_by_column(weight_OB: torch.Tensor, upper_BB: torch.Tensor, mask_OG: torch.Tensor) -> torch.Tensor:
    error_OG = torch.zeros_like(mask_OG, dtype=weight_OB.dtype)
    for column in range(mask_OG.shape[1]):
        removed_O = mask_OG[:, column]
        error_OG[:, column] = weight_OB[:, column].where(removed_O, 0) / upper_BB[column, column]
        weight_OB[:, column:] -= error_OG[:, column, None] * upper_BB[column, column:]
        weight_OB[:, column].masked_fill_(removed_O, 0)
    return error_OG


def _by_outer_products(weight_OB: torch.Tensor, upper_BB: torch.Tensor, mask_OG: torch.Tensor) -> torch.Tensor:
    """The same in two kernels a column, whose launches bound a GPU."""
    groups = mask_OG.shape[1]
    inverse_OG = mask_OG / upper_BB.diagonal()[:groups]
    error_OG = torch.empty_like(inverse_OG)
    for column in range(groups):
        torch.mul(weight_OB[:, column], inverse_OG[:, column], out=error_OG[:, column])
        weight_OB[:, column:].addr_(error_OG[:, column], upper_BB[column, column:], alpha=-1)
    weight_OB[:, :groups].masked_fill_(mask_OG, 0)
    return error_OG
