"""The default way to prune, on families whose layers are built in other ways: a model that can be evaluated beside the dense
one."""

from __future__ import annotations

import os

import pytest
from transformers import AutoModelForCausalLM

from helpers.family_runs import CALIBRATION
from helpers.more_families import SUPPORTED
from helpers.uneven import steep
from helpers.zoo import FAMILIES
from stun.config import (
    Budget,
    Dropped,
    ExpertsConfig,
    ExpertsMethod,
    ModelConfig,
    PruneConfig,
    Score,
    StunError,
)
from stun.evaluation.config import EvaluateConfig
from stun.evaluation.job import evaluate
from stun.pruning.job import prune

# Residual streams; outputs of experts that are normalised, or in a space of their own; a cache of its own; and one like most.
FEW = ("deepseek_v4", "gemma4", "nemotron_h", "minimax", "qwen3_moe")
pytestmark = pytest.mark.slow


def request(source, run_dir, **experts) -> PruneConfig:
    chosen = ExpertsConfig(ExpertsMethod.rank, fraction=0.5, score=Score.residual, **experts)
    return PruneConfig(ModelConfig(str(source)), CALIBRATION, chosen, target=0.3, run_dir=str(run_dir))


@pytest.mark.parametrize("family", [*FAMILIES, *SUPPORTED] if os.environ.get("STUN_ALL_FAMILIES") else FEW)
def test_a_model_that_can_be_evaluated(checkpoint, tmp_path, ranks, family):
    source, run_dir = checkpoint(family), tmp_path / "run"
    summary = prune(request(source, run_dir, refit=True), ranks)
    assert abs(summary["sparsity"] - 0.3) < 1e-4
    dense, pruned = tmp_path / "dense.json", tmp_path / "pruned.json"
    evaluate(EvaluateConfig(ModelConfig(str(source)), text=CALIBRATION, output=str(dense)), ranks)
    beside = EvaluateConfig(ModelConfig(str(run_dir / "model")), text=CALIBRATION, dense=str(dense), output=str(pruned))
    assert 0 < evaluate(beside, ranks)["agreement"]["kl"] < 20


def test_uneven_layers_under_another_name_of_a_family(tmp_path, ranks):
    """Kimi-K2 is a DeepSeek-V3."""
    source = steep(tmp_path / "source", "deepseek_v3", n_group=1, topk_group=1)
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"model_type": "deepseek_v3"', '"model_type": "kimi_k2"'))
    chosen = ExpertsConfig(budget=Budget["global"])
    summary = prune(PruneConfig(ModelConfig(str(source)), CALIBRATION, chosen, target=0.3, run_dir=str(tmp_path / "run")), ranks)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert len(set(summary["kept"]) - {0}) > 1 and model.config.model_type == "stun_deepseek_v3"


@pytest.mark.parametrize("family", ["deepseek_ocr2", "qwen3_omni_moe"])
def test_uneven_layers_that_no_code_could_describe_are_refused(checkpoint, tmp_path, ranks, family):
    chosen = ExpertsConfig(ExpertsMethod.rank, budget=Budget["global"])
    cfg = PruneConfig(ModelConfig(str(checkpoint(family))), CALIBRATION, chosen, target=0.3, run_dir=str(tmp_path / "run"))
    with pytest.raises(StunError, match=f"builds no base model of {family}; layers cannot keep different numbers of experts"):
        prune(cfg, ranks)
    assert not (tmp_path / "run").exists()


def test_constants_have_the_width_of_the_experts_outputs(checkpoint, tmp_path, ranks):
    summary = prune(request(checkpoint("nemotron_h"), tmp_path / "run", dropped=Dropped.novice), ranks)
    assert abs(summary["sparsity"] - 0.3) < 1e-4
    model = ModelConfig(str(tmp_path / "run" / "model"))
    assert evaluate(EvaluateConfig(model, text=CALIBRATION, output=str(tmp_path / "result.json")), ranks)["perplexity"] > 1
