"""Checkpoints whose layers keep different numbers of experts: load, generate, re-save, prune again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.family_runs import CALIBRATION
from helpers.stock import check_statistics, forbid, load_stock, logits_of
from helpers.tensors import load_tensors, same_tensors
from helpers.uneven import pruned, steep, target_of
from helpers.zoo import FAMILIES as ZOO
from helpers.zoo import SHAPE
from stun.checkpoint.reader import Checkpoint
from stun.config import Budget, ExpertsConfig, Scope, SparsifyConfig
from stun.data.samples import calibration_samples
from stun.data.tokenizer import load_tokenizer
from stun.model.architecture import Architecture
from stun.model.tensor_names import experts_of

FAMILIES = ["arctic", "deepseek_v3", "gpt_oss", "mixtral", "phimoe", "qwen3_next"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_generates_and_saves_again(tmp_path, ranks, family):
    source = steep(tmp_path / "source", family)
    # Nearly all of a layer's parameters are its experts'; the target is a whole number of them only by chance.
    folder, kept = pruned(source, tmp_path / "run", ranks, target=0.199, sparsify=SparsifyConfig(scope=[Scope.experts]))
    counts = [len(survivors) for survivors in kept]
    assert len({count for count in counts if count}) > 1, "the layers must differ"
    model = load_stock(folder)
    found = [experts_of(layer) for layer in model.base_model.layers]
    assert [len(next(experts[1].parameters())) if experts else 0 for experts in found] == counts
    prompt = torch.arange(3, 20)[None]
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(prompt, use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached, plain) and cached.shape[1] > 20
    model.save_pretrained(tmp_path / "again", max_shard_size="60KB")
    same_tensors(folder, tmp_path / "again")
    again = load_stock(tmp_path / "again")
    assert torch.equal(again(prompt).logits, model(prompt).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_computes_what_the_survivors_do(tmp_path, ranks, family):
    source = steep(tmp_path / "source", family)
    folder, kept = pruned(source, tmp_path / "run", ranks, target=target_of(source, 8))
    assert sum(map(len, kept)) == sum(x.num_experts for x in Architecture(Checkpoint.open(source)).layers) - 8
    model, tokens = load_stock(source), calibration_samples(CALIBRATION, load_tokenizer(source), 260).tokens_ST
    with contextlib.ExitStack() as replaced:
        for layer, survivors in zip(model.base_model.layers, kept, strict=True):
            if experts_of(layer):
                forbid(layer, survivors, replaced)
        expected = logits_of(model, tokens)
    torch.testing.assert_close(logits_of(load_stock(folder), tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_as_a_source(tmp_path, ranks):
    """A heterogeneous checkpoint is observed and pruned like any other, and takes the stock form again where counts agree."""
    source = steep(tmp_path / "source", "qwen3_moe")
    experts = ExpertsConfig(fraction=1.0, budget=Budget["global"], keep_at_least=4)
    folder, kept = pruned(source, tmp_path / "one", ranks, target=target_of(source, 6), experts=experts)
    assert len({len(k) for k in kept if k}) > 1
    arch = Architecture(Checkpoint.open(folder))
    tokens = calibration_samples(CALIBRATION, load_tokenizer(folder), 260).tokens_ST
    assert [layout.num_experts for layout in arch.layers] == [len(k) for k in kept]
    check_statistics(arch, load_stock(folder), tokens, ranks, tmp_path / "observed", "heterogeneous qwen3_moe")
    level = sum(len(k) for k in kept) - 4 * len([k for k in kept if k])
    flat, kept = pruned(folder, tmp_path / "two", ranks, target=target_of(folder, level), experts=experts)
    assert {len(k) for k in kept if k} == {4}
    config = json.loads((flat / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe" and config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert "experts_per_layer" not in config
    load_stock(flat)


@pytest.mark.slow
def test_stock_transformers_refuse_it_without_trust(tmp_path, ranks):
    folder, _ = pruned(steep(tmp_path / "source", "mixtral"), tmp_path / "run", ranks, target=0.199, sparsify=SparsifyConfig())
    script = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode and "pass the argument `trust_remote_code=True`" in done.stderr


def test_experts_implementation_follows_the_model(tmp_path, ranks):
    """A change of the experts implementation after loading reaches every layer."""
    folder, _ = pruned(steep(tmp_path / "source", "mixtral"), tmp_path / "run", ranks, target=0.199, sparsify=SparsifyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation("batched_mm")
    used = {experts_of(layer)[1].config._experts_implementation for layer in model.base_model.layers}
    assert used == {"batched_mm"}
    assert AutoConfig.from_pretrained(folder).experts_per_layer == [len(e) for e in _experts(folder)]


def test_made_from_a_configuration():
    config = AutoConfig.for_model("stun_mixtral", **{**SHAPE, **ZOO["mixtral"], "experts_per_layer": [3, 5, 4]})
    model = AutoModelForCausalLM.from_config(config)
    assert [experts_of(layer)[1].num_experts for layer in model.base_model.layers] == [3, 5, 4]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["granitemoe", "mixtral", "qwen3_moe"])
def test_the_loss_that_balances_experts(family):
    """Its formula, each expert's share of the routes times its mean probability, in a loop over layers and experts; generation
    asks for it too where config.json does."""
    shape = {**SHAPE, **ZOO[family], "mlp_only_layers": [], "output_router_logits": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(f"stun_{family}", **shape, experts_per_layer=[3, 8, 5])).eval()
    prompt, top_k = torch.arange(3, 20)[None], model.config.num_experts_per_tok
    output = model(prompt, labels=prompt)
    share, probability = torch.zeros(8), torch.zeros(8)
    for logits, count in zip(output.router_logits, [3, 8, 5], strict=True):
        assert torch.isfinite(logits[:, :count]).all() and (logits[:, count:] == -torch.inf).all()
        for expert in range(count):
            own = logits[:, :count].softmax(-1)
            share[expert] += (own.topk(top_k).indices == expert).float().sum() / (3 * 17)
            probability[expert] += own[:, expert].sum() / (3 * 17)
    torch.testing.assert_close(output.aux_loss, 8 * (share * probability).sum())
    output.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    assert model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] == 21


def _experts(folder):
    numbers: dict[int, set] = {}
    for name in load_tensors(folder):
        if ".experts." in name:
            numbers.setdefault(int(name.split(".layers.")[1].split(".")[0]), set()).add(name.split(".experts.")[1].split(".")[0])
    return [numbers[layer] for layer in sorted(numbers)]
