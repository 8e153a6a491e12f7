"""Forms a released checkpoint may take beyond a plain one: text models inside others, doubled fields, files beside."""

from __future__ import annotations

import json
import math
import resource

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from helpers.forms import rewrite, run
from helpers.stock import load_stock
from helpers.tensors import load_tensors
from helpers.zoo import FAMILIES, SHAPE, byte_tokenizer, make_checkpoint, randomise
from stun.checkpoint.reader import Checkpoint
from stun.config import Budget, ExpertsConfig
from stun.model.architecture import Architecture


def test_text_model_inside_another(tmp_path, ranks):
    """Qwen3.5: experts are pruned inside text_config, the vision tower is copied, and both stock classes load the result."""
    text = {**SHAPE, **FAMILIES["qwen3_5_moe_text"]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
    source = tmp_path / "source"
    model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=text, vision_config=vision))
    randomise(model)
    model.save_pretrained(source, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(source)
    before = load_tensors(source)
    folder, plan, summary = run(source, tmp_path / "run", ranks)
    assert abs(summary["sparsity"] - 0.4) < 1e-4 and len(plan["layers"][0]["kept"]) < 8
    written = load_tensors(folder)
    tower = [name for name in before if "visual" in name]
    assert tower and all(torch.equal(before[name], written[name]) for name in tower)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["num_experts"] == len(plan["layers"][0]["kept"]) and "num_experts" not in config
    whole, info = Qwen3_5MoeForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    prompt = torch.arange(3, 40)[None]
    alone = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(alone(prompt).logits, whole(input_ids=prompt).logits, atol=1e-5, rtol=1e-5)
    wide, plan, _ = run(source, tmp_path / "wide", ranks, experts=ExpertsConfig(budget=Budget["global"]))
    config = json.loads((wide / "config.json").read_text())
    assert config["model_type"] == "stun_qwen3_5_moe" and config["text_config"]["model_type"] == "qwen3_5_moe_text"
    assert config["text_config"]["experts_per_layer"] == [len(layer["kept"]) for layer in plan["layers"]]
    again = load_tensors(wide)
    assert all(torch.equal(before[name], again[name]) for name in tower)
    load_stock(wide)


@pytest.mark.parametrize(
    "family, name, alias", [("mixtral", "num_local_experts", "num_experts"), ("qwen3_moe", "num_experts", "num_local_experts")]
)
def test_one_count_is_written(tmp_path, ranks, family, name, alias):
    """Where config.json counts experts under two names, one is left: on loading, the other would win."""
    source = make_checkpoint(tmp_path / "source", family)
    rewrite(source, load_tensors(source), **{name: 8, alias: 8})
    folder, plan, _ = run(source, tmp_path / "run", ranks)
    config = json.loads((folder / "config.json").read_text())
    assert config[name] == len(plan["layers"][0]["kept"]) < 8 and alias not in config
    load_stock(folder)


def test_shared_experts_are_not_counted_as_experts(tmp_path, ranks):
    source = make_checkpoint(tmp_path / "source", "deepseek_v3", n_shared_experts=2)
    folder, _, _ = run(source, tmp_path / "run", ranks)
    assert json.loads((folder / "config.json").read_text())["n_shared_experts"] == 2


def test_what_is_never_sparsified(tmp_path, ranks):
    """Routers, their biases, gates and norms, whatever module they are; all other matrices of a layer belong to a scope."""
    for family in FAMILIES:
        arch = Architecture(Checkpoint.open(make_checkpoint(tmp_path / family, family)))
        for layout in arch.layers:
            assert not set(layout.linears) & set(layout.routed)
            left = {inside for name, inside in layout.dense.items() if name not in layout.linears}
            matrices = {inside for inside in left if len(arch.info(_source(layout, inside)).shape) > 1 and "conv" not in inside}
            routing = (
                "mlp.gate.weight",
                "moe.gate.weight",
                "feed_forward.gate.weight",
                "router.weight",
                "wg.weight",
                "correction_bias",
            )
            steering = ("shared_expert_gate.weight", "A_log", "in_proj_ba.weight", "in_proj_a.weight", "in_proj_b.weight")
            never = (*routing, *steering, "x_proj.weight", "dt_proj.weight")
            assert all(inside.endswith(never) for inside in matrices), (family, matrices)
            assert not any(layout.dense[name].endswith(never) for name in layout.linears), family
            assert all("norm" not in name and "bias" not in name for name in layout.linears)


def _source(layout, inside: str) -> str:
    return next(name for name, other in layout.dense.items() if other == inside)


def test_extra_files_travel(tmp_path, ranks):
    source = make_checkpoint(tmp_path / "source", "mixtral")
    (source / "modeling_mine.py").write_text("raise SystemExit('never run')")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    folder, _, _ = run(source, tmp_path / "run", ranks)
    for name in ("modeling_mine.py", "additional_chat_templates/tools.jinja", "tokenizer.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_opening_allocates_no_weights(tmp_path):
    """A layer whose experts are larger than any machine's memory is described from its header: a file of holes."""
    count, hidden, width = 2**10, 2**13, 2**14
    config = AutoConfig.for_model("gpt_oss", **{**SHAPE, "num_hidden_layers": 1, "hidden_size": hidden, "head_dim": 64})
    config.update({"num_local_experts": count, "intermediate_size": width, "layer_types": ["full_attention"]})
    config.save_pretrained(tmp_path)
    shapes = {"model.embed_tokens.weight": (260, hidden), "lm_head.weight": (260, hidden), "model.norm.weight": (hidden,)}
    own = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,), "self_attn.sinks": (4,)}
    own |= {f"self_attn.{name}_proj.weight": (rows, hidden) for name, rows in (("q", 256), ("k", 128), ("v", 128))}
    own |= {f"self_attn.{name}_proj.bias": (rows,) for name, rows in (("q", 256), ("k", 128), ("v", 128), ("o", hidden))}
    own |= {"self_attn.o_proj.weight": (hidden, 256), "mlp.router.weight": (count, hidden), "mlp.router.bias": (count,)}
    own |= {"mlp.experts.gate_up_proj": (count, hidden, 2 * width), "mlp.experts.gate_up_proj_bias": (count, 2 * width)}
    own |= {"mlp.experts.down_proj": (count, width, hidden), "mlp.experts.down_proj_bias": (count, hidden)}
    header, end = {}, 0
    for name, shape in (shapes | {f"model.layers.0.{name}": shape for name, shape in own.items()}).items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    packed = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        file.truncate(8 + len(packed) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    arch = Architecture(Checkpoint.open(tmp_path))
    assert arch.layers[0].num_experts == count and arch.parameters_of(arch.layers[0]) > 400e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "KiB"


def test_names_as_transformers_saves_them(checkpoint, tmp_path, ranks):
    """It reads DeepSeek-V4 by the names of the hub and writes some of its own: both are the same model."""
    source = checkpoint("deepseek_v4")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "saved")
    byte_tokenizer().save_pretrained(tmp_path / "saved")
    one, other = (Architecture(Checkpoint.open(folder)) for folder in (source, tmp_path / "saved"))
    assert one.source.tensors.keys() != other.source.tensors.keys()
    for own, again in zip(one.layers, other.layers, strict=True):
        assert sorted(own.dense.values()) == sorted(again.dense.values()) and own.unused == again.unused == []
    assert sorted(one.outer.values()) == sorted(other.outer.values())
    for folder, name in ((source, "first"), (tmp_path / "saved", "second")):
        run(folder, tmp_path / name, ranks)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
