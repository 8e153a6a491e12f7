"""Forms a released checkpoint may take beyond a plain one: prediction heads, fp8, text models inside others, doubled fields."""

from __future__ import annotations

import json
import math
import resource
import shutil

import pytest
import torch
from conftest import load_tensors
from family_runs import CALIBRATION
from safetensors.torch import save_file
from test_families import load_stock
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration
from zoo import FAMILIES, SHAPE, byte_tokenizer, make_checkpoint, randomise

from stun.arch import Architecture
from stun.checkpoint import Checkpoint, write_index
from stun.config import Budget, ExpertsConfig, ModelConfig, PruneConfig, StunError
from stun.prune import prune
from stun.ranks import Ranks

UNIFORM = ExpertsConfig(fraction=0.5)


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as started:
        yield started


def run(source, run_dir, ranks, target=0.4, experts=UNIFORM):
    """(folder, plan, summary) of one run."""
    summary = prune(PruneConfig(ModelConfig(str(source)), CALIBRATION, experts, target=target, run_dir=str(run_dir)), ranks)
    return run_dir / "model", json.loads((run_dir / "plan.json").read_text()), summary


def rewrite(folder, tensors, **config):
    """Replace a checkpoint's tensors, in two files, and change its config.json."""
    for file in folder.glob("model*"):
        file.unlink()
    names = sorted(tensors)
    halves = {"model-a.safetensors": names[::2], "model-b.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name].contiguous() for name in own}, folder / file, metadata={"format": "pt"})
    write_index(folder, {file: {name: tensors[name].nbytes for name in own} for file, own in halves.items()})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))


def with_head(folder, family: str, last: str, head: str):
    """Give a checkpoint a prediction head at `head`, a copy of its layer `last` with other weights and a projection."""
    make_checkpoint(folder, family)
    tensors = load_tensors(folder)
    own = {name.replace(last, head): t + 0.05 * torch.randn_like(t) for name, t in tensors.items() if name.startswith(last)}
    rewrite(folder, {**tensors, **own, f"{head}eh_proj.weight": torch.randn(32, 64)})
    return own


@pytest.mark.parametrize(
    "family, last, head",
    [("deepseek_v3", "model.layers.2.", "model.layers.3."), ("qwen3_next", "model.layers.3.", "mtp.layers.0.")],
)
def test_prediction_head_loses_experts_like_the_layers(tmp_path, ranks, family, last, head):
    source = tmp_path / "source"
    own = with_head(source, family, last, head)
    folder, plan, _ = run(source, tmp_path / "run", ranks)
    (kept,) = [layer["kept"] for layer in plan["mtp"]]
    count = len(plan["layers"][-1]["kept"])
    assert len(kept) == count < 8
    written = load_tensors(folder)
    for name, tensor in own.items():
        if ".experts." in name:
            number = int(name.split(".experts.")[1].split(".")[0])
            if number in kept:
                renamed = name.replace(f".experts.{number}.", f".experts.{kept.index(number)}.")
                assert torch.equal(written[renamed], tensor)
            assert (name in written) == (number < count)
        elif ".mlp.gate." in name:
            assert torch.equal(written[name], tensor[kept]), name
        else:
            assert torch.equal(written[name], tensor), name
    assert f"{head}eh_proj.weight" in written
    groups = [expert // 4 for expert in kept]
    assert family != "deepseek_v3" or groups.count(0) == groups.count(1), "the head's router is limited to groups too"
    wide, plan, _ = run(source, tmp_path / "wide", ranks, experts=ExpertsConfig(fraction=0.5, budget=Budget["global"]))
    assert [layer["kept"] for layer in plan["mtp"]] == [list(range(8))]
    assert all(torch.equal(load_tensors(wide)[name], tensor) for name, tensor in own.items())


def test_prediction_head_of_another_form_is_refused(tmp_path, ranks):
    source = tmp_path / "source"
    with_head(source, "deepseek_v3", "model.layers.2.", "model.layers.3.")
    tensors = load_tensors(source)
    del tensors["model.layers.3.mlp.experts.2.up_proj.weight"]
    rewrite(source, tensors)
    with pytest.raises(StunError, match=r"model\.layers\.3\.mlp holds experts outside.*no .*mlp\.experts\.2\.up_proj"):
        run(source, tmp_path / "run", ranks)


def fp8(folder, family, block: int):
    """Quantise every matrix of a checkpoint's layers but the routers in blocks, as DeepSeek-V3 was released; the exact values."""
    make_checkpoint(folder, family, dtype=torch.bfloat16)
    tensors, exact = load_tensors(folder), {}
    for name, tensor in list(tensors.items()):
        exact[name] = tensor
        if ".layers." in name and tensor.dim() == 2 and name.endswith("proj.weight"):
            rows, columns = tensor.shape
            scales = torch.empty(-(-rows // block), -(-columns // block))
            quantised = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
            exact[name] = torch.empty_like(tensor)
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    part = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                    scales[i, j] = tensor[part].float().abs().max() / 448
                    quantised[part] = (tensor[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
                    exact[name][part] = (quantised[part].float() * scales[i, j]).bfloat16()
            tensors[name], tensors[name + "_scale_inv"] = quantised, scales
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    rewrite(folder, tensors, quantization_config=config)
    return exact


@pytest.mark.parametrize("block", [8, 20], ids=["whole blocks", "cut blocks"])
def test_fp8_is_multiplied_out(tmp_path, ranks, block):
    source = tmp_path / "source"
    exact = fp8(source, "deepseek_v3", block)
    folder, _, _ = run(source, tmp_path / "same", ranks, target=0.0)
    written = load_tensors(folder)
    assert written.keys() == exact.keys()
    assert all(torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype for name, tensor in exact.items())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    ours = load_stock(folder)
    if block == 8:  # transformers multiplies out whole blocks only
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).float()
        prompt = torch.arange(3, 40)[None]
        torch.testing.assert_close(ours(prompt).logits, theirs(prompt).logits, atol=1e-4, rtol=1e-4)
    pruned, _, summary = run(source, tmp_path / "pruned", ranks)
    assert abs(summary["sparsity"] - 0.4) < 1e-4
    load_stock(pruned)


def test_fp8_without_its_scales_is_refused(tmp_path, ranks):
    source = tmp_path / "source"
    fp8(source, "deepseek_v3", 8)
    tensors = load_tensors(source)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    rewrite(source, {key: tensor for key, tensor in tensors.items() if key != f"{name}_scale_inv"})
    with pytest.raises(StunError, match=rf"{name} is fp8 but has no {name}_scale_inv"):
        run(source, tmp_path / "run", ranks)
    rewrite(source, {**tensors, f"{name}_scale_inv": torch.ones(2, 2)})
    with pytest.raises(StunError, match=rf"{name}_scale_inv has shape \(2, 2\).*\(3, 4\)"):
        run(source, tmp_path / "run", ranks)


@pytest.mark.parametrize("method", [{"quant_method": "mxfp4"}, {"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}])
def test_other_quantised_forms_are_refused(tmp_path, ranks, method):
    source = make_checkpoint(tmp_path / "source", "mixtral")
    rewrite(source, load_tensors(source), quantization_config=method)
    with pytest.raises(StunError, match=rf"quantised \({method['quant_method']}\).*bf16"):
        run(source, tmp_path / "run", ranks)


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
    with pytest.raises(StunError, match=r"budget=global: qwen3_5_moe wraps"):
        run(source, tmp_path / "wide", ranks, experts=ExpertsConfig(budget=Budget["global"]))


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


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "exaone_moe"])
def test_groups_keep_equal_numbers(tmp_path, ranks, family):
    source = make_checkpoint(tmp_path / "source", family)
    for budget in Budget:
        _, plan, _ = run(source, tmp_path / budget.name, ranks, experts=ExpertsConfig(fraction=0.8, budget=budget))
        for layer in plan["layers"]:
            groups = [expert // 4 for expert in layer["kept"]]
            assert not layer["kept"] or 2 <= groups.count(0) == groups.count(1)


def test_illegal_counts_are_refused_before_work(tmp_path, ranks):
    source = make_checkpoint(tmp_path / "source", "deepseek_v3")
    with pytest.raises(StunError, match=r"a layer must keep 4 \(top-k 2, in 2 groups of at least 2"):
        run(source, tmp_path / "run", ranks, target=0.6, experts=ExpertsConfig(fraction=1.0))
    odd = tmp_path / "odd"
    shutil.copytree(source, odd)
    content = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**content, "n_group": 3}))
    with pytest.raises(StunError, match=r"8 experts do not divide into n_group=3 groups"):
        run(odd, tmp_path / "run", ranks)
    assert not (tmp_path / "run").exists()


def test_what_is_never_sparsified(tmp_path, ranks):
    """Routers, their biases, gates and norms, whatever module they are; all other matrices of a layer belong to a scope."""
    for family in FAMILIES:
        arch = Architecture(Checkpoint.open(make_checkpoint(tmp_path / family, family)))
        for layout in arch.layers:
            assert not set(layout.linears) & set(layout.routed)
            left = {inside for name, inside in layout.dense.items() if name not in layout.linears}
            matrices = {inside for inside in left if len(arch.info(_source(layout, inside)).shape) > 1 and "conv" not in inside}
            allowed = ("gate.weight", "router.weight", "wg.weight", "shared_expert_gate.weight", "correction_bias", "A_log")
            steering = ("in_proj_ba.weight", "in_proj_a.weight", "in_proj_b.weight", "x_proj.weight", "dt_proj.weight")
            assert all(inside.endswith(allowed + steering) for inside in matrices), (family, matrices)
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
