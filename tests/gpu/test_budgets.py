"""Kernels and host syncs, counted on a pretend GPU at Arctic's shapes: bounds that fail when they grow."""

from __future__ import annotations

import json

import pytest

from helpers.launches import run_pretend

pytestmark = pytest.mark.slow

# At most so many kernels and syncs. Lower them with the code; counts are exact.
BUDGETS = {
    "weight_sums of an expert": (32, 1),
    "power_sums of an expert": (212, 2),
    "masks of an expert": (86, 10),
    "a micro-batch": (108, 2),
    "a micro-batch, observed": (139, 2),
    "an expert in a micro-batch": (5, 0),
    "an expert in a micro-batch, observed": (5, 0),
}


@pytest.fixture(scope="module")
def counts(checkpoint):
    """What helpers/gpu_counts.py counts."""
    sources = [checkpoint("arctic", num_local_experts=experts) for experts in (8, 16)]
    return json.loads(run_pretend(["-m", "helpers.gpu_counts", *sources]).stdout)


@pytest.mark.parametrize("piece", BUDGETS)
def test_kernels_and_syncs_do_not_grow(counts, piece):
    found, (kernels, syncs) = counts[piece], BUDGETS[piece]
    assert found["kernels"] <= kernels and found["syncs"] <= syncs, f"{piece}: {found}"


def test_every_piece_has_a_budget(counts):
    assert counts.keys() == BUDGETS.keys()
