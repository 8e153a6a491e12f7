"""More families: the stream against transformers' own forward, and what is written against the stock classes."""

from __future__ import annotations

import pytest

from helpers.family_checks import cases, check_family, tried
from helpers.launches import run_warm
from helpers.more_families import KINDS, SUPPORTED
from helpers.zoo import make_checkpoint

pytestmark = pytest.mark.ranks
TRIED = tried(KINDS, SUPPORTED)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """(sources, runs): a checkpoint of every family, and its run on two ranks, made by one launch."""
    folder = tmp_path_factory.mktemp("more")
    for family in TRIED:
        make_checkpoint(folder / "sources" / family, family)
    run_warm(["-m", "helpers.family_runs", folder / "sources", folder / "runs", *TRIED], 2)
    return folder / "sources", folder / "runs"


@pytest.mark.parametrize("family", cases(KINDS, SUPPORTED))
def test_family(two_ranks, ranks, tmp_path, family):
    sources, runs = two_ranks
    assert len(list((sources / family).glob("model-*.safetensors"))) > 3, "several shards"
    check_family(family, sources / family, runs / family, tmp_path, ranks)
