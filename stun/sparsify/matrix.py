"""What a configuration does to one matrix."""

from __future__ import annotations

import torch

from stun.config import SparsifyConfig, SparsifyMethod
from stun.sparsify.alps import alps
from stun.sparsify.refit import refit
from stun.sparsify.scores import magnitude_scores, output_error, require_finite, wanda_scores
from stun.sparsify.select import Pattern, smallest_of_pattern, smallest_per_row, without
from stun.sparsify.sparsegpt import sparsegpt

SOLVERS = {SparsifyMethod.sparsegpt: sparsegpt, SparsifyMethod.alps: alps}


def sparsify(how: SparsifyConfig, weight_OD: torch.Tensor, moment: torch.Tensor | None, total: int, what: str) -> torch.Tensor:
    """A new matrix [O, D] in the same dtype, with `total` of the weights removed.

    `moment` are the inputs' sums of squares [D], or their Gram matrix [D, D] where `how.reads_grams`; None for magnitudes alone.
    Where SparseGPT or ALPS ends with a larger output error than Wanda's mask, that mask with refitted values is taken. Raises
    StunError, naming `what`, for non-finite scores.
    """
    pattern = Pattern.parse(how.pattern)
    gram_DD = moment if how.reads_grams else None
    masked_OD = without(weight_OD, _mask(how, weight_OD, moment, total, pattern, what))
    if how.method in SOLVERS:
        solved_OD = SOLVERS[how.method](weight_OD, gram_DD, total, pattern).to(weight_OD.dtype)
        require_finite(solved_OD, f"{what}: {how.method.name}")
        worse = _error(solved_OD, weight_OD, gram_DD) > _error(masked_OD, weight_OD, gram_DD)
        masked_OD = refit(masked_OD, weight_OD, gram_DD) if worse else solved_OD
    return refit(masked_OD, weight_OD, gram_DD) if how.reconstruct else masked_OD


def scores_of(how: SparsifyConfig, weight_OD: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """[O, D] scores by which weights are chosen, where no solver finds better ones; `moment` as in `sparsify`."""
    if how.method is SparsifyMethod.magnitude:
        return magnitude_scores(weight_OD)
    return wanda_scores(weight_OD, moment.diagonal() if moment.dim() == 2 else moment)


def _mask(how: SparsifyConfig, weight_OD, moment, total: int, pattern: Pattern | None, what: str) -> torch.Tensor:
    scores_OD = scores_of(how, weight_OD, moment)
    name = "MoE-Pruner" if how.method is SparsifyMethod.moe_pruner else how.method.name.capitalize()
    require_finite(scores_OD, f"{what}: {'Wanda' if how.method in SOLVERS else name} score")
    return smallest_of_pattern(scores_OD, pattern) if pattern else smallest_per_row(scores_OD, total)


def _error(weight_OD: torch.Tensor, dense_OD: torch.Tensor, gram_DD: torch.Tensor) -> float:
    """Output error of the whole matrix; rows are added in float64, one after the other."""
    return sum(output_error(dense_OD.to(gram_DD.dtype) - weight_OD.to(gram_DD.dtype), gram_DD).double().tolist())
