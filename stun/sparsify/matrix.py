"""Sparsification of one matrix by the configured method."""

import torch

from stun.config import SparsifyConfig, SparsifyMethod
from stun.sparsify.alps import alps
from stun.sparsify.refit import refit
from stun.sparsify.scores import magnitude_scores, output_error, require_finite, wanda_scores
from stun.sparsify.select import Pattern, smallest_of_pattern, smallest_per_row, without
from stun.sparsify.sparsegpt import sparsegpt

SOLVERS = {SparsifyMethod.sparsegpt: sparsegpt, SparsifyMethod.alps: alps}


def sparsify(config: SparsifyConfig, weight_OD: torch.Tensor, moment: torch.Tensor | None, total: int, name: str) -> torch.Tensor:
    """New matrix [O, D] in the same dtype, with `total` weights removed.

    `moment` is the inputs' sum of squares [D], or their Gram matrix [D, D] if `config.reads_grams`; None for magnitude pruning.
    If SparseGPT or ALPS ends with a larger output error than Wanda's mask, that mask with refitted values is used. Raises
    StunError, with `name` in the message, for non-finite scores.
    """
    pattern = Pattern.parse(config.pattern)
    masked_OD = without(weight_OD, _mask(config, weight_OD, moment, total, pattern, name))
    if not config.reads_grams:
        return masked_OD
    assert moment is not None
    if config.method in SOLVERS:
        solved_OD = SOLVERS[config.method](weight_OD, moment, total, pattern).to(weight_OD.dtype)
        require_finite(solved_OD, f"{name}: {config.method.name}")
        worse = _error(solved_OD, weight_OD, moment) > _error(masked_OD, weight_OD, moment)
        masked_OD = refit(masked_OD, weight_OD, moment) if worse else solved_OD
    return refit(masked_OD, weight_OD, moment) if config.reconstruct else masked_OD


def scores_of(config: SparsifyConfig, weight_OD: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """Scores [O, D] of the weights, lowest removed first; `moment` as in `sparsify`."""
    if config.method is SparsifyMethod.magnitude:
        return magnitude_scores(weight_OD)
    assert moment is not None
    return wanda_scores(weight_OD, moment.diagonal() if moment.dim() == 2 else moment)


def _mask(config: SparsifyConfig, weight_OD, moment, total: int, pattern: Pattern | None, name: str) -> torch.Tensor:
    scores_OD = scores_of(config, weight_OD, moment)
    method = "MoE-Pruner" if config.method is SparsifyMethod.moe_pruner else config.method.name.capitalize()
    require_finite(scores_OD, f"{name}: {'Wanda' if config.method in SOLVERS else method} score")
    return smallest_of_pattern(scores_OD, pattern) if pattern else smallest_per_row(scores_OD, total)


def _error(weight_OD: torch.Tensor, dense_OD: torch.Tensor, gram_DD: torch.Tensor) -> float:
    """Output error of the whole matrix; rows are added in float64 and in order, so that every run gets the same sum."""
    return sum(output_error(dense_OD.to(gram_DD.dtype) - weight_OD.to(gram_DD.dtype), gram_DD).double().tolist())
