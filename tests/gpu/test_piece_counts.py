"""Kernels and host syncs of the pieces of a run on a GPU, counted on a pretend one: exact, so that they can be budgets."""

from __future__ import annotations

import json

import pytest

from helpers.launches import run_pretend

# At most so many kernels and syncs, by piece (helpers/piece_counts.py); docs/performance.md has those of before.
BUDGETS = {
    "sums of weights, an expert": (40, 1),
    "powers of weights, a matrix": (120, 1),
    "powers of non-zero weights, a matrix": (120, 1),
    "2:4 of scores, a matrix": (22, 0),
    "smallest scores of a matrix": (34, 5),
    "SparseGPT, a column": (2.5, 0.05),
    "SparseGPT 2:4, a column": (9, 0),
    "plain: kernels an expert, syncs a micro-batch": (8, 2),
    "observed: kernels an expert, syncs a micro-batch": (8, 2),
    "measured: kernels an expert, syncs a micro-batch": (8, 2),
    "measured, grams: kernels an expert, syncs a micro-batch": (8, 2),
}


@pytest.mark.slow
def test_no_piece_takes_more_kernels_or_syncs():
    done = run_pretend(["-m", "helpers.piece_counts", "--json"])
    found = json.loads(done.stdout.splitlines()[-1])
    for piece, (kernels, syncs) in BUDGETS.items():
        assert found[piece][0] <= kernels and found[piece][1] <= syncs, (piece, found[piece])
