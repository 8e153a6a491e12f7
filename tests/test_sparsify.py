"""Masks and accumulators against naive loops."""

from __future__ import annotations

import pytest
import torch

from stun.config import StunError
from stun.sparsify import quotas, require_finite, smallest_per_row, wanda_scores
from stun.stats import CoActivation, OutputNorms, saliency, squared_sum


def naive_mask(scores: torch.Tensor, total: int) -> torch.Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    rows = len(scores)
    for row in range(rows):
        count = (row + 1) * total // rows - row * total // rows
        order = sorted(range(scores.shape[1]), key=lambda column: (scores[row, column].item(), column))
        mask[row, order[:count]] = True
    return mask


@pytest.mark.parametrize("total", [0, 1, 17, 100, 6 * 40 - 1, 6 * 40])
@pytest.mark.parametrize("tied", [False, True])
def test_smallest_per_row(total, tied):
    generator = torch.Generator().manual_seed(total)
    scores = torch.rand(6, 40, generator=generator)
    scores = (scores * 4).floor() if tied else scores
    mask = smallest_per_row(scores, total)
    assert torch.equal(mask, naive_mask(scores, total)) and int(mask.sum()) == total


def test_constant_row_loses_its_first_columns():
    assert smallest_per_row(torch.ones(1, 8), 3)[0].tolist() == [True] * 3 + [False] * 5


def test_wanda_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(5, 7, generator=generator), torch.randn(50, 7, generator=generator)
    expected = torch.tensor([[abs(weight[i, j]) * inputs[:, j].norm() for j in range(7)] for i in range(5)])
    torch.testing.assert_close(wanda_scores(weight, squared_sum(inputs)), expected)


@pytest.mark.parametrize("sizes, total", [([7, 7, 7], 10), ([1, 1000, 3], 502), ([5], 5), ([3, 4], 0)])
def test_quotas_add_up(sizes, total):
    shares = quotas(sizes, total)
    assert sum(shares) == total and all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    assert all(abs(share - total * size / sum(sizes)) < 1 for share, size in zip(shares, sizes, strict=True))


def test_non_finite_names_the_place():
    weight = torch.ones(2, 3)
    weight[1, 2] = float("nan")
    with pytest.raises(StunError, match=r"layer 4.*\[1, 2\]"):
        require_finite(weight, "layer 4")


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_coactivation_is_a_loop_over_tokens(top_k):
    generator = torch.Generator().manual_seed(top_k)
    index = torch.rand(200, 9, generator=generator).topk(top_k).indices
    counts = CoActivation(9)
    for part in index.split(64):
        counts.add(part)
    expected = torch.zeros(9, 9, dtype=torch.int64)
    for token in index.tolist():
        for i in token:
            for j in token:
                expected[i, j] += 1
    assert torch.equal(counts.counts_EE, expected)


def test_saliencies_are_means_over_routed_tokens():
    generator = torch.Generator().manual_seed(1)
    outputs, gates = torch.randn(30, 6, generator=generator), torch.rand(30, generator=generator)
    norms = OutputNorms(3)
    norms.add(1, outputs[:10], gates[:10])
    norms.add(1, outputs[10:], gates[10:])
    reap = sum(gates[t] * outputs[t].norm() for t in range(30)) / 30
    msan = sum(outputs[t].norm() ** 2 for t in range(30)) / 30
    torch.testing.assert_close(saliency(norms.sums_E5, "reap"), torch.tensor([0.0, reap, 0.0]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(saliency(norms.sums_E5, "msan")[1], msan.double(), atol=1e-5, rtol=0)
