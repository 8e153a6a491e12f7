"""Tensors and entries of config.json that do not belong together are refused before any work starts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from helpers.forms import rewrite, run, with_head
from helpers.tensors import load_tensors
from helpers.zoo import make_checkpoint
from stun.config import StunError


def cut(name: str, rows: int):
    return lambda tensors: tensors.update({name: tensors[name][:rows]})


def retype(part: str, dtype):
    return lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items() if part in name})


def copied(name: str, other: str):
    return lambda tensors: tensors.update({other: tensors[name].clone()})


def without_dimensions(name: str):
    return lambda tensors: tensors.update({name: torch.tensor(1.0)})


L1, MOE, HEAD = "model.layers.1.", "model.layers.1.block_sparse_moe.", "model.layers.3.mlp."


TENSORS = {
    "short fused part": (
        "gpt_oss",
        cut(f"{L1}mlp.experts.gate_up_proj", 6),
        r"gate_up_proj has shape \(6, 32, 48\).*\(8, 32, 48\)",
    ),
    "short fused bias": ("gpt_oss", cut(f"{L1}mlp.experts.gate_up_proj_bias", 4), r"bias has shape \(4, 48\)"),
    "flat fused part": ("gpt_oss", without_dimensions(f"{L1}mlp.experts.down_proj"), r"down_proj has shape \(\)"),
    "flat expert": ("mixtral", without_dimensions(f"{MOE}experts.2.w1.weight"), r"layer 1, expert 2: gate_up_proj must be"),
    "unknown tensor of an expert": (
        "mixtral",
        copied(f"{MOE}gate.weight", f"{MOE}experts.0.input_scale"),
        "input_scale belongs to an",
    ),
    "router under two names": ("mixtral", copied(f"{MOE}gate.weight", f"{L1}mlp.gate.weight"), "the same tensor of the model"),
    "expert numbered 3000000": (
        "mixtral",
        copied(f"{MOE}experts.0.w1.weight", f"{MOE}experts.3000000.w1.weight"),
        "holds 9 experts, numbered 0 to 3000000; config.json says 8",
    ),
    "short embedding": ("mixtral", cut("model.embed_tokens.weight", 200), r"embed_tokens\.weight has shape \(200, 32\)"),
    "integer experts": ("mixtral", retype("experts.3.w2", torch.int8), r"experts\.3\.w2\.weight holds torch\.int8"),
    "an expert's matrices of two dtypes": (
        "mixtral",
        retype("experts.3.w3", torch.bfloat16),
        r"layer 0, expert 3: gate_up_proj must be of one dtype, and .*w1\.weight holds torch\.float32, .*w3.* torch\.bfloat16",
    ),
    "integer router": ("mixtral", retype("layers.2.block_sparse_moe.gate", torch.int32), r"gate\.weight holds torch\.int32"),
    "fp8 that config.json does not tell": ("mixtral", retype("experts.", torch.float8_e4m3fn), "holds torch.float8_e4m3fn"),
    "head with a short router": ("head", cut(f"{HEAD}gate.weight", 4), r"3\.mlp\.gate\.weight has shape \(4, 32\).*\(8, 32\)"),
    "head with a flat router": ("head", without_dimensions(f"{HEAD}gate.weight"), r"has shape \(\)"),
    "head with a short bias": ("head", cut(f"{HEAD}gate.e_score_correction_bias", 4), r"bias has shape \(4,\)"),
    "head with a short expert": ("head", cut(f"{HEAD}experts.0.up_proj.weight", 4), r"expert 0: gate_up_proj must be"),
    "head without a router": (
        "head",
        lambda tensors: tensors.pop(f"{HEAD}gate.weight"),
        "no tensor like model.layers.2.mlp.gate.weight",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused_before_work(tmp_path, ranks, name):
    family, damage, message = TENSORS[name]
    source = tmp_path / "source"
    if family == "head":
        with_head(source, "deepseek_v3", "model.layers.2.", "model.layers.3.")
    else:
        make_checkpoint(source, family)
    tensors = load_tensors(source)
    damage(tensors)
    rewrite(source, tensors)
    with pytest.raises(StunError, match=message):
        run(source, tmp_path / "run", ranks)
    assert not (tmp_path / "run").exists()


CONFIGS = {
    "fewer layers than stored": (
        "mixtral",
        {"num_hidden_layers": 2},
        r"model\.layers\.2\.mlp\.experts: neither in one of the 2 layers",
    ),
    "larger vocabulary": ("mixtral", {"vocab_size": 400}, r"has shape \(260, 32\), config.json asks for \(400, 32\)"),
    "count is a text": ("mixtral", {"num_local_experts": "8"}, "transformers cannot build"),
    "count is a list": ("hunyuan_v1_moe", {"num_experts": [8, 8, 8]}, "transformers cannot build"),
    "layers is a text": ("qwen3_moe", {"num_hidden_layers": "x"}, "transformers cannot build"),
    "no experts a token": ("mixtral", {"num_experts_per_tok": 0}, "asks for 0 experts a token"),
    "more experts a token than there are": ("mixtral", {"num_experts_per_tok": 9}, "asks for 9 experts a token, a layer has 8"),
    "no groups": ("deepseek_v3", {"n_group": None}, "n_group=None, topk_group=1|transformers cannot build"),
    "no group chosen": ("deepseek_v3", {"topk_group": 0}, "n_group=2, topk_group=0"),
    "more groups chosen than there are": ("deepseek_v3", {"topk_group": 3}, "n_group=2, topk_group=3"),
    "groups of one": ("deepseek_v3", {"n_group": 8}, "8 experts in n_group=8 groups; routing needs equal groups of at least 2"),
    "quantization_config is a text": ("mixtral", {"quantization_config": "fp8"}, "quantization_config must be an object"),
    "architectures are numbers": ("mixtral", {"architectures": [1]}, r"config\.json: architectures\.0: must be a text"),
    "text_config is a text": ("mixtral", {"text_config": "x"}, "cannot build|must be"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_that_does_not_fit_is_refused_before_work(tmp_path, ranks, name):
    family, change, message = CONFIGS[name]
    source = make_checkpoint(tmp_path / "source", family)
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(StunError, match=message):
        run(source, tmp_path / "run", ranks)
    assert not (tmp_path / "run").exists()


def test_two_sets_of_weights(tmp_path, ranks):
    """As where transformers saves in several files over an earlier model in one, or the other way round."""
    source = make_checkpoint(tmp_path / "source", "mixtral")
    save_file(load_tensors(source), source / "model.safetensors", metadata={"format": "pt"})
    for _ in range(2):  # the second time without the files of the index, which transformers removes
        with pytest.raises(StunError, match=r"source: holds two sets of weights: model\.safetensors is what transformers loads"):
            run(source, tmp_path / "run", ranks)
        for file in source.glob("model-*.safetensors"):
            file.unlink()
    (source / "model.safetensors.index.json").unlink()
    run(source, tmp_path / "run", ranks)
