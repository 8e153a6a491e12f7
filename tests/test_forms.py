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
from stun.budget import measure_layers
from stun.checkpoint import Checkpoint, write_index
from stun.config import Budget, ExpertsConfig, ModelConfig, PruneConfig, Scope, StunError
from stun.prune import prune

UNIFORM = ExpertsConfig(fraction=0.5)


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
    router = own[f"{head}mlp.gate.weight"]
    router[1:4] = router[0] + 0.001 * torch.randn(3, 32)  # without groups, all that leave would leave the first
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
    with pytest.raises(StunError, match=r"model\.layers\.3\.mlp\.experts, expert 2: gate_up_proj must be \(48, 32\)"):
        run(source, tmp_path / "run", ranks)


def fp8(folder, family, height: int, width: int):
    """Quantise every matrix of a checkpoint's layers but the routers in blocks, as DeepSeek-V3 was released; the exact values."""
    make_checkpoint(folder, family, dtype=torch.bfloat16)
    tensors, exact = load_tensors(folder), {}
    for name, tensor in list(tensors.items()):
        exact[name] = tensor
        if ".layers." in name and tensor.dim() == 2 and name.endswith("proj.weight"):
            rows, columns = tensor.shape
            scales = torch.empty(-(-rows // height), -(-columns // width))
            quantised = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
            exact[name] = torch.empty_like(tensor)
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    part = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                    scales[i, j] = tensor[part].float().abs().max() / 448
                    quantised[part] = (tensor[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
                    exact[name][part] = (quantised[part].float() * scales[i, j]).bfloat16()
            tensors[name], tensors[name + "_scale_inv"] = quantised, scales
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [height, width]}
    rewrite(folder, tensors, quantization_config=config)
    return exact


@pytest.mark.parametrize("block", [(8, 8), (8, 4), (20, 12)], ids=["square", "flat", "cut at the edges"])
def test_fp8_is_multiplied_out(tmp_path, ranks, block):
    source = tmp_path / "source"
    exact = fp8(source, "deepseek_v3", *block)
    folder, _, _ = run(source, tmp_path / "same", ranks, target=0.0)
    written = load_tensors(folder)
    assert written.keys() == exact.keys()
    assert all(torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype for name, tensor in exact.items())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    ours = load_stock(folder)
    if block == (8, 8):  # transformers multiplies out whole blocks only
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).float()
        prompt = torch.arange(3, 40)[None]
        torch.testing.assert_close(ours(prompt).logits, theirs(prompt).logits, atol=1e-4, rtol=1e-4)
    pruned, _, summary = run(source, tmp_path / "pruned", ranks)
    assert abs(summary["sparsity"] - 0.4) < 1e-4
    load_stock(pruned)


def test_fp8_without_its_scales_is_refused(tmp_path, ranks):
    source = tmp_path / "source"
    fp8(source, "deepseek_v3", 8, 8)
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
    with pytest.raises(StunError, match=r"8 experts in n_group=3 groups; routing needs equal groups of at least 2"):
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


@pytest.mark.parametrize("family", ["jamba", "phimoe"])
def test_the_fewest_experts_a_family_can_route_to(tmp_path, ranks, family):
    source = make_checkpoint(tmp_path / "source", family, num_experts_per_tok=1)
    sizes = measure_layers(Architecture(Checkpoint.open(source)), list(Scope))
    all_but_one = 7 * sum(size.expert for size in sizes) / sum(size.total for size in sizes)
    with pytest.raises(StunError, match=r"a layer must keep 2"):
        run(source, tmp_path / "run", ranks, target=all_but_one, experts=ExpertsConfig(fraction=1.0))


def test_top_k_bounds_what_a_group_keeps(tmp_path, ranks):
    """Four experts a token from one group of two: no group may fall below four."""
    source = make_checkpoint(tmp_path / "source", "deepseek_v3", num_experts_per_tok=4)
    with pytest.raises(StunError, match=r"a layer must keep 8 \(top-k 4, in 2 groups of at least 4"):
        run(source, tmp_path / "run", ranks)


def test_the_largest_top_k_of_all_layers_counts(tmp_path, ranks):
    source = make_checkpoint(tmp_path / "source", "hunyuan_v1_moe", moe_topk=[1, 4, 2])
    assert Architecture(Checkpoint.open(source)).top_k == 4
    with pytest.raises(StunError, match=r"a layer must keep 4 \(top-k 4"):
        run(source, tmp_path / "run", ranks, target=0.6, experts=ExpertsConfig(fraction=1.0))


def test_greedy_routing_knows_no_groups(tmp_path, ranks):
    """DeepSeek-V2-Lite: n_group stands in its config, and means nothing."""
    source = make_checkpoint(tmp_path / "source", "deepseek_v2", topk_method="greedy", n_group=3, topk_group=0)
    assert Architecture(Checkpoint.open(source)).groups == 1
    _, plan, _ = run(source, tmp_path / "run", ranks)
    assert 0 < len(plan["layers"][-1]["kept"]) < 8


def test_head_follows_the_layers_where_a_global_budget_leaves_them_alike(tmp_path, ranks):
    """One layer with experts: the global budget gives one count, the config is the stock one, and the head must agree with it."""
    source = tmp_path / "source"
    make_checkpoint(source, "deepseek_v3", num_hidden_layers=2)
    tensors = load_tensors(source)
    head = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in tensors.items() if "layers.1." in name}
    rewrite(source, {**tensors, **head})
    folder, plan, _ = run(source, tmp_path / "run", ranks, experts=ExpertsConfig(fraction=0.5, budget=Budget["global"]))
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and config["n_routed_experts"] == len(plan["mtp"][0]["kept"]) < 8


@pytest.mark.parametrize("head_is_fused", [False, True])
def test_fused_layers_with_a_head_of_either_form(tmp_path, ranks, head_is_fused):
    """Qwen3.5's experts may be stored in one tensor a layer, and those of its head one by one."""
    source = make_checkpoint(tmp_path / "source", "qwen3_5_moe_text", num_hidden_layers=2)
    tensors = load_tensors(source)

    def fused(layer: str) -> dict:
        own = lambda part, e: tensors[f"{layer}mlp.experts.{e}.{part}_proj.weight"]  # noqa: E731
        gate_up = torch.stack([torch.cat([own("gate", e), own("up", e)]) for e in range(8)])
        down = torch.stack([own("down", e) for e in range(8)])
        return {f"{layer}mlp.experts.gate_up_proj": gate_up, f"{layer}mlp.experts.down_proj": down}

    layers = ["model.layers.0.", "model.layers.1."]
    head = {name.replace("model.layers.1.", "mtp.layers.0."): t + 0.1 for name, t in tensors.items() if "layers.1." in name}
    if head_is_fused:
        tensors |= head
        head = {name: t for name, t in head.items() if ".experts." not in name} | fused("mtp.layers.0.")
    joined = {name: t for layer in layers for name, t in fused(layer).items()}
    plain = {name: t for name, t in tensors.items() if ".experts." not in name}
    rewrite(source, {**plain, **joined, **head})
    folder, plan, summary = run(source, tmp_path / "run", ranks)
    assert abs(summary["sparsity"] - 0.4) < 1e-4
    kept, written = plan["mtp"][0]["kept"], load_tensors(folder)
    assert len(kept) == len(plan["layers"][0]["kept"]) < 8
    if head_is_fused:
        name = "mtp.layers.0.mlp.experts.gate_up_proj"
        assert torch.equal(written[name], head[name][kept])
    else:
        for number, expert in enumerate(kept):
            where = "mtp.layers.0.mlp.experts.{}.up_proj.weight"
            assert torch.equal(written[where.format(number)], head[where.format(expert)])
        assert where.format(len(kept)) not in written
    load_stock(folder)


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
