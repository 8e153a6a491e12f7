"""Checkpoints in other forms: the refusal says what they are and how to get one that is read."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.forms import rewrite
from helpers.tensors import load_tensors
from helpers.zoo import make_checkpoint
from stun.checkpoint.reader import Checkpoint
from stun.config import StunError
from stun.model.architecture import Architecture

CONVERT = r"from_pretrained\(.*\.save_pretrained\(new\)"
# Files of a folder: what the error says.
FOLDERS = {
    "GGUF": (["model-Q4_K_M.gguf", "README.md"], rf"model-Q4_K_M.gguf: GGUF weights, for llama.cpp; .*{CONVERT}"),
    "GGUF with a config": (["config.json", "model.gguf"], "model.gguf: GGUF weights"),
    "pickled": (["config.json", "pytorch_model-00001-of-00002.bin"], rf"pytorch_model-00001-of-00002.bin: pickled .*{CONVERT}"),
    "pickled alone": (["model.pt"], r"model.pt: pickled weights.*the hub's form: config.json"),
    "pickled, .pth": (["config.json", "weights.pth"], "weights.pth: pickled weights"),
    "Meta's": (["consolidated.00.pth", "params.json"], r"consolidated.00.pth: weights in their developer's own form.*convert_"),
    "Mistral's": (["consolidated.safetensors", "params.json", "tekken.json"], "consolidated.safetensors: weights in their"),
    "LoRA": (["adapter_config.json", "adapter_model.safetensors"], r"adapter_config.json: a LoRA adapter .*merge_and_unload\("),
    "LoRA, pickled, with a config": (["adapter_config.json", "adapter_model.bin", "config.json"], "a LoRA adapter"),
    "no weights": (["config.json"], "holds neither model.safetensors.index.json nor model.safetensors"),
    "nothing": ([], "has no config.json$"),
    "a run": (["plan.json", "model/config.json"], r"has no config.json; did you mean .*/model\?$"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_in_another_form(tmp_path, name):
    files, says = FOLDERS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(StunError, match=says) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, says", [("a.gguf", "a.gguf: GGUF weights"), ("model.safetensors", "a file; give the folder")])
def test_a_file(tmp_path, name, says):
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(StunError, match=f"model.path={tmp_path}/{name}: {says}"):
        Checkpoint.open(tmp_path / name)


def test_other_files_beside_the_weights_are_no_matter(tmp_path):
    make_checkpoint(tmp_path, "mixtral")
    for name in ("model.gguf", "pytorch_model.bin", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    assert Checkpoint.open(tmp_path).tensors


@pytest.mark.parametrize(
    "settings, says",
    [
        (
            {"quant_method": "gptq", "bits": 3},
            r"quantised \(gptq, gptq, 3 bits\).*use the bf16 release that they were made from$",
        ),
        ({"quant_method": "awq"}, r"quantised \(awq, gemm, None bits\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quantised \(bitsandbytes\).*bf16 release.*\.dequantize\(\)"),
    ],
)
def test_quantised_weights(tmp_path, settings, says):
    make_checkpoint(tmp_path, "mixtral")
    rewrite(tmp_path, load_tensors(tmp_path), quantization_config=settings)
    with pytest.raises(StunError, match=says):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("end, method", [("qweight", "gptq or awq"), ("weight.absmax", "bitsandbytes")])
def test_quantised_weights_that_config_json_does_not_tell(tmp_path, end, method):
    make_checkpoint(tmp_path, "mixtral")
    tensors = load_tensors(tmp_path)
    name = "model.layers.1.self_attn.q_proj."
    rewrite(tmp_path, {**tensors, f"{name}{end}": torch.zeros(4, 4, dtype=torch.int32)})
    with pytest.raises(StunError, match=rf"quantised \({method}\)"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"num_experts": 0}, {"text_config": {"model_type": "qwen3", "num_hidden_layers": 2}}])
def test_a_dense_model(tmp_path, changes):
    make_checkpoint(tmp_path, "mixtral")
    content = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 3, **changes}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(StunError, match=r"'qwen3' is dense.*Mixture-of-Experts.*llm-compressor"):
        Architecture(Checkpoint.open(tmp_path))
