"""The allocation of experts to layers: exact against brute force."""

import itertools
import random

import pytest

from stun.planning.allocation import _curve, allocate


@pytest.mark.parametrize("step", [1, 2])
def test_least_sum_is_brute_force(step):
    rng = random.Random(step)
    for _ in range(20):
        losses = [{step: rng.random(), 3 * step: rng.random(), 5 * step: rng.random()} for _ in range(3)] + [{}]
        total = step * rng.randint(1, 15)
        found = allocate(losses, total, step)
        curves = [_curve(layer, step) for layer in losses]
        every = itertools.product(*(range(len(curve)) for curve in curves))
        least = min(sum(c[n] for c, n in zip(curves, own, strict=True)) for own in every if step * sum(own) == total)
        assert sum(found) == total and found[3] == 0 and all(number % step == 0 for number in found)
        assert sum(c[n // step] for c, n in zip(curves, found, strict=True)) == pytest.approx(least, rel=1e-12)


def test_layers_that_lose_less_lose_more_experts():
    robust, frail = {2: 0.001, 4: 0.002, 6: 0.003}, {2: 0.1, 4: 0.2, 6: 0.9}
    assert allocate([frail, robust], 8, 1) == [2, 6]
    assert allocate([frail, {}, robust], 4, 2) == [0, 0, 4]


def test_losses_between_the_measured_ones():
    curve_R = _curve({2: 0.01, 4: 0.04, 6: 0.02}, 1)
    assert curve_R == pytest.approx([0, 0.005, 0.01, 0.02, 0.04, 0.04, 0.04]), "linear, then geometric; it never falls"
    assert _curve({2: 0.0, 4: 0.04}, 2) == pytest.approx([0, 0, 0.04])
