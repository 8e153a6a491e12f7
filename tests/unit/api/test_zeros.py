"""Zeros while a pruned model is fine-tuned: the page's examples, and every form of a result."""

from __future__ import annotations

import json
import re

import pytest
import torch

import stun
from helpers.pages import page
from helpers.stock import load_stock
from helpers.tensors import load_tensors
from helpers.uneven import pruned, steep
from stun.checkpoint.reader import Checkpoint
from stun.config import Budget, Dropped, ExpertsConfig, ExpertsMethod, SparsifyConfig, StunError, Uneven
from stun.model.architecture import Architecture
from stun.model.remote_code import FILE

BOTH = {"target": 0.4, "sparsify": SparsifyConfig()}  # whole experts and single weights
CODE = ExpertsConfig(ExpertsMethod.rank, fraction=0.5, budget=Budget["global"])
PADDED = ExpertsConfig(ExpertsMethod.rank, fraction=0.5, budget=Budget["global"], uneven=Uneven.padded)
NOVICE = ExpertsConfig(ExpertsMethod.rank, fraction=0.5, budget=Budget["global"], dropped=Dropped.novice)
TOKENS = torch.arange(3, 67).view(2, 32)


def zeros_of(folder) -> dict[str, torch.Tensor]:
    """Places of the zeros of each matrix in a checkpoint's layers."""
    return {name: tensor == 0 for name, tensor in load_tensors(folder).items() if ".layers." in name and tensor.dim() > 1}


def step(model) -> None:
    """A step of AdamW with momentum of an earlier one and weight decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()


@pytest.mark.slow
def test_the_page(tmp_path, ranks, monkeypatch, capsys):
    """A result whose layers differ; what the page prints, and the zeros of what it saves."""
    folder, kept = pruned(steep(tmp_path / "source", "qwen3_moe"), tmp_path / "runs" / "half", ranks, **BOTH, experts=CODE)
    assert len({len(experts) for experts in kept if experts}) > 1
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page("healing"), re.M | re.S)
    exec("\n".join(blocks), {})
    printed = capsys.readouterr().out
    before = zeros_of(folder)
    total = sum(int(places.sum()) for places in before.values())
    assert f"{total} zeros, {total} after a full step" in printed and f"{total} after a step of a loop" in printed
    assert f"{total} restored" in printed and int(re.search(r"(\d+) after the merge", printed)[1]) < 0.8 * total
    dense = load_tensors(folder)
    for healed in ("healed", "merged"):
        saved = load_tensors(tmp_path / "runs" / "half" / healed)
        assert saved.keys() == dense.keys() and (tmp_path / "runs" / "half" / healed / FILE).is_file()
        changed = {name for name in dense if not torch.equal(dense[name], saved[name])}
        assert {name.split(".")[-2] for name in changed} >= {"q_proj", "v_proj", "down_proj"}
        assert all((saved[name][places] == 0).all() for name, places in before.items())
        load_stock(tmp_path / "runs" / "half" / healed)


@pytest.mark.slow
@pytest.mark.parametrize("family, experts", [("gpt_oss", PADDED), ("mixtral", NOVICE)], ids=["padded", "novice"])
def test_other_forms(tmp_path, ranks, family, experts):
    folder, _ = pruned(steep(tmp_path / "source", family), tmp_path / "run", ranks, **BOTH, experts=experts)
    before, dense = zeros_of(folder), load_tensors(folder)
    lost = load_stock(folder)
    step(lost)
    lost.save_pretrained(tmp_path / "lost")
    assert sum(int((before[name] & ~places).sum()) for name, places in zeros_of(tmp_path / "lost").items()) > 1000
    model = load_stock(folder)
    zeros = stun.KeepZeros(model)
    step(model)
    zeros.restore()
    model.save_pretrained(tmp_path / "healed")
    saved = load_tensors(tmp_path / "healed")
    assert saved.keys() == dense.keys() and all((saved[name][places] == 0).all() for name, places in before.items())
    biases = [name for name in dense if name.endswith("router.bias")]
    assert bool(biases) is (family == "gpt_oss")
    assert all(torch.equal(saved[name] == -1e4, dense[name] == -1e4) for name in biases)
    constants = [name for name in dense if name.endswith("approx_value")]
    assert bool(constants) is (family == "mixtral")
    assert any(not torch.equal(saved[name], dense[name]) for name in constants or biases)
    config = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "healed")]
    listed = "approximate_experts" if constants else "padded_experts"
    assert config[0][listed] == config[1][listed] and Architecture(Checkpoint.open(tmp_path / "healed")).layers


def test_refused(checkpoint):
    from peft import LoraConfig, get_peft_model

    model = load_stock(checkpoint("mixtral"))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0] = 0
    zeros = stun.KeepZeros(model)
    with pytest.raises(StunError, match="the model has adapters"):
        stun.KeepZeros(get_peft_model(load_stock(checkpoint("mixtral")), LoraConfig(target_modules=["q_proj"])))
    model.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(torch.ones(32, 32))
    with pytest.raises(StunError, match="replaced or sharded"):
        zeros.restore()


def test_the_decoder_alone_is_held_too(checkpoint):
    """Without the head its layers' names begin with `layers.`."""
    decoder = load_stock(checkpoint("mixtral")).model
    weight = decoder.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight[0] = 0
    zeros = stun.KeepZeros(decoder)
    with torch.no_grad():
        weight.add_(1)
    zeros.restore()
    assert (weight[0] == 0).all() and (weight[1:] != 0).any()
