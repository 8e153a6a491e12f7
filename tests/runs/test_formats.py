"""Quantised checkpoints, kept in their form or made: the same bytes on any number of ranks and after an interruption."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.family_runs import CALIBRATION
from helpers.launches import run_job, settings
from helpers.quantised import gpt_oss, quantised
from helpers.selections import config
from helpers.stops import stopped_after
from helpers.tensors import same_tensors
from helpers.zoo import make_checkpoint
from stun.checkpoint.reader import Checkpoint
from stun.config import ExpertsConfig, ExpertsMethod, OutputConfig, OutputFormat, SparsifyConfig, SparsifyMethod
from stun.pruning.job import prune

SMALL = {"calibration__samples": CALIBRATION.samples, "calibration__length": CALIBRATION.length}
EXPERTS = ExpertsConfig(method=ExpertsMethod.rank, fraction=0.5)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("form", ["gpt_oss", "int4", "plain"])
def test_same_bytes_on_more_ranks_and_after_an_interruption(tmp_path, ranks, form):
    """... with experts and single weights removed, and refitted; what is made NVFP4 of plain weights is solved too."""
    source, output, world = tmp_path / "source", OutputConfig(), 2
    if form == "gpt_oss":
        gpt_oss(source)
    elif form == "int4":
        quantised(source, form)
    else:  # q, k and v share a scale, and different ranks write them
        make_checkpoint(source, "mixtral", dtype=torch.bfloat16)
        output, world = OutputConfig(OutputFormat.nvfp4), 4
    experts = replace(EXPERTS, refit=True)
    method = SparsifyMethod.sparsegpt if form == "plain" else SparsifyMethod.wanda
    how = {"calibration": CALIBRATION, "output": output, "sparsify": SparsifyConfig(method=method)}
    prune(config(source, tmp_path / "whole", 0.4, experts, **how), ranks)
    whole = tmp_path / "whole" / "model"
    assert list(Checkpoint.open(whole).formats) == (["nvfp4"] if form == "plain" else list(Checkpoint.open(source).formats))
    own = {"experts__refit": experts.refit, "output__format": output.format.name, "sparsify": method.name}
    run_job("prune", settings(source, tmp_path / "more", experts="rank", experts__fraction=0.5, **own, **SMALL), world)
    same_tensors(whole, tmp_path / "more" / "model")
    cfg = config(source, tmp_path / "stopped", 0.4, experts, **how)
    with stopped_after("prune", 1):
        prune(cfg, ranks)
    prune(cfg, ranks)
    same_tensors(whole, tmp_path / "stopped" / "model")
