"""What a run says before it starts."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.paths import ROOT
from helpers.selections import config
from stun.planning.job import resolve_model
from stun.pruning.describe import notices


@pytest.mark.parametrize("target, warns", [(0.95, True), (0.9, False)])
def test_a_high_target_is_beyond_what_was_measured(checkpoint, tmp_path, target, warns):
    """The line gives the numbers of docs/quality.md at the highest sparsity there."""
    measured = json.loads((ROOT / "docs" / "quality" / "default-reference.json").read_text())
    rows = [measured["results"][name]["0.8"][0] for name in ("default", "weights alone (Wanda)")] + [measured["dense"]]
    default, wanda, dense = (f"{(row['odd'] + row['even']) / 2:.3f}" for row in rows)
    job = resolve_model(config(checkpoint("mixtral"), tmp_path, target))
    said = [line for line in notices(job, torch.device("cpu")) if "target=" in line]
    kept = f"{default} by default and {wanda} by Wanda, of {dense} (docs/quality.md)"
    line = f"warning: target={target}: nothing above 0.8 was measured; there the reference model's exact match is {kept}"
    assert said == [line] * warns and max(map(float, measured["results"]["default"])) == 0.8
