"""Quantised checkpoints are evaluated as their dequantised twins are, pruned or not, and reported."""

from __future__ import annotations

import json
import shutil

import pytest

from helpers.family_runs import CALIBRATION
from helpers.forms import fp8, rewrite
from helpers.paths import TEXT
from helpers.quantised import gpt_oss, quantised
from helpers.selections import config
from stun.checkpoint.reader import Checkpoint
from stun.config import CalibrationConfig, ExpertsConfig, ExpertsMethod, ModelConfig, OutputConfig, OutputFormat
from stun.evaluation.config import EvaluateConfig
from stun.evaluation.job import evaluate
from stun.pruning.job import prune
from stun.report.write import write_reports

PACKED = CalibrationConfig(path=str(TEXT), samples=4, length=24)


def scored(folder, ranks) -> float:
    """Perplexity of a few texts."""
    output = folder.parent / f"{folder.name}.json"
    return evaluate(EvaluateConfig(ModelConfig(str(folder)), text=PACKED, output=str(output)), ranks)["perplexity"]


def dequantised(folder):
    """The same model in bfloat16, beside it."""
    twin, source = folder.parent / f"{folder.name} dequantised", Checkpoint.open(folder)
    shutil.copytree(folder, twin)
    rewrite(twin, {name: source.read(name) for name in source.tensors}, quantization_config=None)
    return twin


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8 block", "int8", "int4 with zero points", "mxfp4", "nvfp4 modelopt", "gptq", "awq"])
def test_scored_as_if_dequantised(tmp_path, ranks, form):
    folder = quantised(tmp_path / "source", form)
    assert scored(folder, ranks) == scored(dequantised(folder), ranks)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_through_both_streams_evaluation_and_report(tmp_path, ranks, family):
    source, run = tmp_path / "source", tmp_path / "run"
    if family == "gpt_oss":
        gpt_oss(source)
    else:
        fp8(source, family, 16, 12)
    experts = ExpertsConfig(method=ExpertsMethod.rank, fraction=0.5, refit=True)
    kept = OutputConfig(OutputFormat.source)
    summary = prune(config(source, run, 0.4, experts, calibration=CALIBRATION, output=kept), ranks)
    form, bits = ("mxfp4", "4.25") if family == "gpt_oss" else ("fp8", f"{Checkpoint.open(source).bits:.3g}")
    assert summary["form"]["written"] == "source" and list(Checkpoint.open(run / "model").formats) == [form]
    assert scored(run / "model", ranks) == scored(dequantised(run / "model"), ranks)
    page = write_reports(run)[0].read_text()
    assert f"{form}, {bits} bits a weight" in page and "as in the source" in page and "size on disk" in page
    assert json.loads((run / "model" / "config.json").read_text())["quantization_config"]
