"""Kernels and host syncs of the pieces of a run, counted on a pretend GPU: exact, so that bounds fail when they grow."""

from __future__ import annotations

import json

import pytest

from helpers.launches import run_pretend
from helpers.pages import commands, page

pytestmark = pytest.mark.slow

# At most so many kernels and syncs, by piece (helpers/piece_counts.py). Lower them with the code; docs/performance.md has earlier
# ones.
BUDGETS = {
    "sums of weights, an expert": (32, 1),
    "powers of weights, a matrix": (106, 1),
    "powers of non-zero weights, a matrix": (108, 1),
    "masks by Wanda with their histograms, an expert": (82, 8),
    "2:4 of scores, a matrix": (22, 0),
    "smallest scores of a matrix": (34, 5),
    "SparseGPT, a column": (2.5, 0.05),
    "SparseGPT 2:4, a column": (9, 0),
    "ALPS, a matrix": (2300, 200),
    "ALPS 2:4, a matrix": (1900, 12),
    "plain: a micro-batch": (110, 1),
    "plain: an expert in it": (5, 0),
    "observed: a micro-batch": (141, 1),
    "observed: an expert in it": (5, 0),
    "measured: a micro-batch": (119, 1),
    "measured: an expert in it": (7, 0),
    "measured, grams: a micro-batch": (119, 1),
    "measured, grams: an expert in it": (7, 0),
}


@pytest.fixture(scope="module")
def counts():
    """What the command of docs/performance.md counts."""
    assert commands("counts", page("performance"))[0].endswith("-m helpers.piece_counts")
    return json.loads(run_pretend(["-m", "helpers.piece_counts", "--json"]).stdout.splitlines()[-1])


@pytest.mark.parametrize("piece", BUDGETS)
def test_kernels_and_syncs_do_not_grow(counts, piece):
    (found_kernels, found_syncs), (kernels, syncs) = counts[piece], BUDGETS[piece]
    assert found_kernels <= kernels and found_syncs <= syncs, f"{piece}: {counts[piece]}"


def test_every_piece_has_a_budget(counts):
    assert counts.keys() == BUDGETS.keys()
