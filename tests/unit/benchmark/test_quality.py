"""docs/quality.md: its tables are what the committed scores say, and so is what other pages quote of them."""

from __future__ import annotations

import re

import pytest

from helpers.paths import ROOT
from stun.benchmark.study import ORDER, across, read_scores
from stun.report.quality import exact_match

FOLDER, PAGE = ROOT / "docs" / "quality", ROOT / "docs" / "quality.md"
OTHERS = ("default", "best", "paper", "no experts")
HELD_BACK = ORDER[2:]  # models with which nothing was chosen


DOMAINS = {text: (f"domain_{text}", f"own_{text}") for text in ("all", "strings", "prose")}  # given text, and own text beside it


def shares(kind: str, method: str, removed: str, models=HELD_BACK) -> list[float]:
    """What a method keeps of the dense models' exact match."""
    scores = read_scores(FOLDER, *DOMAINS.get(kind, (kind,)))
    return [exact_match(scores[m]["results"][method][removed]) / exact_match([scores[m]["dense"]]) for m in models]


@pytest.mark.parametrize("kinds", [("experts",), ("seeds",), ("default",), *DOMAINS.values()])
def test_tables_are_rendered_from_committed_scores(kinds):
    scores, page = read_scores(FOLDER, *kinds), PAGE.read_text()
    assert list(scores) == [model for model in ORDER if kinds != ("seeds",) or model != "qwen3_moe"]
    for removed in next(iter(scores["reference"]["results"].values())):
        assert across(scores, removed) in page


def test_what_choose_a_method_says():
    """... of the two models with which nothing was chosen."""
    page = (ROOT / "docs" / "choose-a-method.md").read_text()
    for kind, method, removed, setting in [
        ("experts", "default", "0.25", "experts.drop=0.25"),
        ("experts", "default", "0.5", "experts.drop=0.25"),
        *(("default", "default", removed, "the default way") for removed in ("0.5", "0.7")),
        *(("default", name, removed, f"experiment={name}") for name in ("best", "quick", "paper") for removed in ("0.5", "0.7")),
    ]:
        (row,) = [line for line in page.splitlines() if setting in line and line.startswith("|")]
        first, second = shares(kind, method, removed)
        assert re.search(rf"{first:.1%} and {second:.1%}", row), (row, first, second)


def test_numbers_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    rows = [("experts", "default", "0.5"), ("experts", "REAP", "0.5"), ("default", "weights alone (Wanda)", "0.5")]
    for kind, method, removed in rows + [("default", m, r) for m in ("default", "best") for r in ("0.5", "0.7")]:
        assert " | ".join(f"{kept:.1%}" for kept in shares(kind, method, removed, ORDER)) in readme, (kind, method, removed)
    for method in ("default", "default and own text"):
        assert " | ".join(f"{kept:.1%}" for kept in shares("strings", method, "0.6", ORDER)) in readme, method


@pytest.mark.parametrize("text", DOMAINS)
def test_own_text_makes_up_for_what_the_given_text_lacks(text):
    """... on every model: ahead of any way on the given text where that misses the task, else not far behind."""
    own = shares(text, "default and own text", "0.6", ORDER)
    best = [max(pair) for pair in zip(*(shares(text, m, "0.6", ORDER) for m in OTHERS), strict=True)]
    assert all(ours > theirs - (0.035 if text == "all" else 0.0) for ours, theirs in zip(own, best, strict=True)), (own, best)


@pytest.mark.parametrize("removed", ["0.5", "0.625"])
def test_the_default_keeps_more_than_any_other_choice_of_experts(removed):
    for method in ("without refit", "energy, without refit", "REAP", "paper"):
        pairs = zip(shares("experts", "default", removed, ORDER), shares("experts", method, removed, ORDER), strict=True)
        assert all(ours > theirs for ours, theirs in pairs), method
