"""The warning about experts that the calibration text rarely reaches."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from stun.pruning.describe import usage_warning
from stun.statistics.store import Statistics


def said(folder, tokens: dict[str, list[int]]) -> str:
    """The warning for one layer whose experts got so many tokens of each source."""
    count, sources = len(next(iter(tokens.values()))), len(tokens)
    coactivation = torch.stack([torch.tensor(served).diag() for served in tokens.values()])
    zeros = {"router_distance": (count, count), "powers": (sources, count, 3, 3), "peak": (sources, count), "weights": (count, 3)}
    statistics = Statistics(folder)
    statistics.save(0, {"coactivation": coactivation, **{n: torch.zeros(s, dtype=torch.float64) for n, s in zeros.items()}})
    identity = {"sources": dict.fromkeys(tokens, 1), "model": "", "calibration_tokens": "", "micro_batch": 1}
    statistics.finish(identity)
    return usage_warning(SimpleNamespace(layers=[SimpleNamespace(index=0, num_experts=count, experts=[{}] * count)]), statistics)


def test_it_counts_and_names_the_source_that_helps(tmp_path):
    """An even share is 10 tokens: less than one of ten is rare. Two of eight experts are, one of them for every source."""
    line = said(tmp_path / "few", {"prose": [20, 20, 20, 18, 1, 1, 0, 0], "code": [0, 0, 0, 0, 0, 0, 0, 0]})
    assert "rarely reaches 2 of 8 experts, 2 of them never" in line and "such as the model's own (stun generate)" in line
    line = said(tmp_path / "some", {"prose": [900, 900, 900, 900, 900, 900, 900, 0], "code": [1, 1, 1, 1, 1, 1, 5, 9]})
    assert (
        "rarely reaches 1 of 8 experts, 0 of them never" in line
        and "raise the weight of its sources (code reaches 1 of them)" in line
    )


def test_it_is_silent_where_use_is_even_enough(tmp_path):
    assert said(tmp_path / "even", {"all": [10, 12, 9, 30, 8, 2, 20, 9]}) == ""
