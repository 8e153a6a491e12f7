"""Rounding in which later columns make up for the error: beside plain rounding, and GPTQ as published, column by column."""

from __future__ import annotations

import pytest
import torch

from stun.sparsify import compensated as module
from stun.sparsify.compensated import compensated, inverted


def published(weight_OD: torch.Tensor, gram_DD: torch.Tensor, step_D: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of arXiv 2210.17323 without blocks, by the inverse of what remains of the Gram matrix."""
    left_OD, rounded_OD, inverse_DD = weight_OD.double().clone(), torch.zeros_like(weight_OD), torch.linalg.inv(gram_DD.double())
    for column in range(weight_OD.shape[1]):
        rounded_OD[:, column] = (left_OD[:, column] / step_D[column]).round() * step_D[column] * (weight_OD[:, column] != 0)
        error_O = (left_OD[:, column] - rounded_OD[:, column]) / inverse_DD[column, column]
        left_OD -= error_O[:, None] * inverse_DD[column]
        inverse_DD = inverse_DD - inverse_DD[:, [column]] * inverse_DD[[column]] / inverse_DD[column, column]
    return rounded_OD


@pytest.mark.parametrize("block", [128, 5])
def test_as_published(monkeypatch, block):
    torch.manual_seed(0)
    monkeypatch.setattr(module, "BLOCK", block)
    inputs_ND = torch.randn(200, 24) @ torch.randn(24, 24)
    gram_DD = inputs_ND.T @ inputs_ND + torch.eye(24)
    weight_OD, step_D = torch.randn(16, 24), torch.rand(24) / 2 + 0.1
    weight_OD[torch.rand(16, 24) < 0.4] = 0
    upper_DD = inverted(torch.linalg.cholesky(gram_DD))
    rounded_OD = compensated(weight_OD, upper_DD, lambda n, v_O: (v_O / step_D[n]).round() * step_D[n])
    torch.testing.assert_close(rounded_OD, published(weight_OD, gram_DD, step_D))
    plain_OD = (weight_OD / step_D).round() * step_D
    errors = [float(((own - weight_OD) @ inputs_ND.T).square().sum()) for own in (rounded_OD, plain_OD)]
    assert bool((rounded_OD[weight_OD == 0] == 0).all())
    assert errors[0] < 0.9 * errors[1]
