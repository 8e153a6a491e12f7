"""Masks and accumulators against naive loops."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers.naive import naive_mask
from stun.config import StunError
from stun.sparsify.scores import require_finite, wanda_scores
from stun.sparsify.select import quotas, smallest_per_row, without
from stun.statistics.accumulators import CoActivation, OutputPowers, norms, squared_sum, weight_sums


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_weights_without_those_of_a_mask(dtype):
    """The bits of masked_fill, of transposed views too, and the weights themselves stay."""
    weight = torch.randn(7, 9).to(dtype)
    weight[0, :3] = torch.tensor([torch.inf, -0.0, torch.nan])
    before = weight.clone()
    for own in (weight, weight.T):
        mask = torch.rand(own.shape) < 0.5
        found, expected = without(own, mask), own.masked_fill(mask, 0)
        assert found.dtype is dtype and torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_coactivation_is_a_loop_over_tokens(top_k):
    generator = torch.Generator().manual_seed(top_k)
    index = torch.rand(200, 9, generator=generator).topk(top_k).indices
    counts = CoActivation(2, 9)
    for part in index.split(64):
        counts.add(1, part)
    expected = torch.zeros(9, 9, dtype=torch.int64)
    for token in index.tolist():
        for i, j in itertools.product(token, token):
            expected[i, j] += 1
    assert torch.equal(counts.counts_SEE[1], expected) and not counts.counts_SEE[0].any()


@pytest.mark.parametrize("top_k", [1, 3])
def test_output_powers_are_sums_over_tokens(top_k):
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(30, 5, generator=generator)[:, :4].topk(top_k).indices  # nobody chooses expert 4
    norm, gate = (torch.rand(30, top_k, generator=generator) for _ in range(2))
    powers = OutputPowers(2, 5)
    for tokens in (slice(0, 10), slice(10, 30)):
        powers.add(1, powers.reduce(index[tokens], gate[tokens], norm[tokens]))
    for expert in range(5):
        hit = index == expert
        for a in range(3):
            for beta in range(3):
                naive = (gate[hit].double() ** a * norm[hit].double() ** beta).sum()
                torch.testing.assert_close(powers.sums_SE33[1, expert, a, beta], naive, atol=0, rtol=1e-12)
        assert powers.peak_SE[1, expert] == (norm[hit].max() if hit.any() else 0)
    assert not powers.sums_SE33[0].any() and not powers.peak_SE[0].any()


def test_norms_are_those_of_the_vectors():
    outputs = torch.randn(7, 3, 11)
    torch.testing.assert_close(norms(outputs), outputs.norm(dim=-1))


def test_weight_sums():
    parts = [torch.randn(4, 5), torch.randn(7)]
    absolute, squared, count = weight_sums(parts)
    together = torch.cat([part.flatten() for part in parts]).double()
    assert count == 27
    assert (absolute, squared) == (pytest.approx(float(together.abs().sum())), pytest.approx(float(together.square().sum())))
