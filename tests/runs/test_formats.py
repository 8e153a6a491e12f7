"""Quantised checkpoints that keep their form: the same bytes on two ranks and after an interruption."""

from __future__ import annotations

import pytest

from helpers.family_runs import CALIBRATION
from helpers.launches import run_job, settings
from helpers.quantised import gpt_oss, quantised
from helpers.selections import config
from helpers.stops import stopped_after
from helpers.tensors import same_tensors
from stun.checkpoint.reader import Checkpoint
from stun.config import ExpertsConfig, ExpertsMethod
from stun.pruning.job import prune

SMALL = {"calibration__samples": CALIBRATION.samples, "calibration__length": CALIBRATION.length}
EXPERTS = ExpertsConfig(method=ExpertsMethod.rank, fraction=0.5)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("form", ["gpt_oss", "int4"])
def test_same_bytes_on_two_ranks_and_after_an_interruption(tmp_path, ranks, form):
    """... with experts and single weights removed."""
    source = gpt_oss(tmp_path / "source") if form == "gpt_oss" else quantised(tmp_path / "source", form)
    prune(config(source, tmp_path / "whole", 0.4, EXPERTS, calibration=CALIBRATION), ranks)
    whole = tmp_path / "whole" / "model"
    assert Checkpoint.open(whole).formats.keys() == Checkpoint.open(source).formats.keys()
    run_job("prune", settings(source, tmp_path / "two", experts="rank", experts__fraction=0.5, **SMALL), 2)
    same_tensors(whole, tmp_path / "two" / "model")
    cfg = config(source, tmp_path / "stopped", 0.4, EXPERTS, calibration=CALIBRATION)
    with stopped_after("prune", 1):
        prune(cfg, ranks)
    prune(cfg, ranks)
    same_tensors(whole, tmp_path / "stopped" / "model")
