"""What a run says before it starts."""

from __future__ import annotations

import json
from statistics import mean

import pytest

from helpers.paths import ROOT
from helpers.selections import config
from stun.planning.job import resolve_model
from stun.pruning.describe import notices


@pytest.mark.parametrize("target, warns", [(0.95, True), (0.9, False)])
def test_a_high_target_is_beyond_what_was_measured(checkpoint, tmp_path, target, warns):
    """The line gives the numbers of docs/weights.md at the highest sparsity there."""
    measured = json.loads((ROOT / "docs" / "weights.json").read_text())
    methods = ("alps + reconstruct, 0.4 as experts", "wanda")
    best, wanda = (f"{mean(row['odd'] for row in measured['results'][name]['0.7']):.3f}" for name in methods)
    said = [line for line in notices(resolve_model(config(checkpoint("mixtral"), tmp_path, target))) if "target=" in line]
    kept = f"{best} by experiment=best and {wanda} by Wanda, of {measured['dense']['odd']:.3f} (docs/weights.md)"
    line = f"warning: target={target}: nothing above 0.7 was measured; there the reference model's exact match is {kept}"
    assert said == [line] * warns and max(map(float, measured["results"]["wanda"])) == 0.7
