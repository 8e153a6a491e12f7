"""Multi-token-prediction heads lose experts as the layers do, whatever form they are stored in."""

from __future__ import annotations

import json
import re

import pytest
import torch

from helpers.family_checks import cases
from helpers.forms import rewrite, run, with_head
from helpers.stock import load_stock
from helpers.tensors import load_tensors
from helpers.zoo import make_checkpoint
from stun.config import Budget, ExpertsConfig, StunError

# Family -> its last layer with experts, and where released models of it have a head.
HEADS = {
    "deepseek_v3": ("model.layers.2.", "model.layers.3."),
    "deepseek_v32": ("model.layers.2.", "model.layers.3."),
    "deepseek_v4": ("layers.3.", "mtp.0."),
    "exaone_moe": ("model.layers.2.", "mtp.layers.0."),
    "glm4_moe_lite": ("model.layers.2.", "model.layers.3."),
    "glm_moe_dsa": ("model.layers.3.", "model.layers.4."),
    "hy_v3": ("model.layers.2.", "model.layers.3."),
    "nemotron_h": ("backbone.layers.3.", "mtp.layers.0."),
    "qwen3_5_moe": ("model.language_model.layers.3.", "mtp.layers.0."),
    "qwen3_next": ("model.layers.3.", "mtp.layers.0."),
}
KINDS = ["deepseek_v3", "deepseek_v4", "qwen3_5_moe"]


@pytest.mark.parametrize("family", cases(KINDS, HEADS))
def test_prediction_head_loses_experts_like_the_layers(tmp_path, ranks, family):
    """Uniform counts: as many, its router's rows and entries with them. Counts that differ: it keeps all. The rest is copied."""
    source, (last, head) = tmp_path / "source", HEADS[family]
    own = with_head(source, family, last, head)
    folder, plan, _ = run(source, tmp_path / "run", ranks)
    (kept,) = [layer["kept"] for layer in plan["mtp"]]
    count = len(plan["layers"][-1]["kept"])
    assert len(kept) == count < 8
    written = load_tensors(folder)
    for name, tensor in own.items():
        number = re.search(r"\.experts\.(\d+)\.", name)
        if number:
            if int(number[1]) in kept:
                renamed = name.replace(number[0], f".experts.{kept.index(int(number[1]))}.")
                assert torch.equal(written[renamed], tensor)
            assert (name in written) == (int(number[1]) < count)
        else:
            is_routed = tensor.shape[:1] == (8,) and re.search(r"gate\.(weight|bias)|_bias$", name)
            assert torch.equal(written[name], tensor[kept] if is_routed else tensor), name
    assert f"{head}eh_proj.weight" in written
    groups = [expert // 4 for expert in kept]
    assert family != "deepseek_v3" or groups.count(0) == groups.count(1), "the head's router is limited to groups too"
    if family == KINDS[0]:
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
