"""Padding with experts of zeros: the same model in the stock form, the same counts, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.forms import run, with_head
from helpers.launches import run_job, settings
from helpers.selections import config
from helpers.stock import load_stock, logits_of
from helpers.tensors import load_tensors, same_tensors
from helpers.uneven import steep
from stun.checkpoint.reader import Checkpoint
from stun.config import Budget, Dropped, ExpertsConfig, ExpertsMethod, StunError, Uneven
from stun.data.samples import calibration_samples
from stun.data.tokenizer import load_tokenizer
from stun.model.architecture import Architecture
from stun.model.families import PADDED
from stun.planning.job import resolve_model
from stun.pruning.job import prune
from stun.pruning.padding import padding

FAMILIES = ["deepseek_v3", "dots1", "glm4_moe", "gpt_oss", "minimax_m2"]
CODE = ExpertsConfig(ExpertsMethod.rank, fraction=0.5, budget=Budget["global"])
PADDING = ExpertsConfig(ExpertsMethod.rank, fraction=0.5, budget=Budget["global"], uneven=Uneven.padded)


def test_places_in_groups():
    assert padding(4, 8, 1) == [4, 5, 6, 7] and padding(4, 8, 2) == [2, 3, 6, 7] and padding(6, 6, 3) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_same_model_in_the_stock_form(tmp_path, ranks, family):
    source = steep(tmp_path / "source", family)
    by_code = prune(config(source, tmp_path / "code", experts=CODE), ranks)
    by_zeros = prune(config(source, tmp_path / "zeros", experts=PADDING, statistics=str(tmp_path / "code")), ranks)
    same = ("kept", "nonzero", "parameters", "sparsity", "experts", "target")
    assert [by_code[key] for key in same] == [by_zeros[key] for key in same]
    assert by_zeros["sparsity"] == pytest.approx(0.4, abs=1e-5) and by_zeros["disk_bytes"] > by_code["disk_bytes"]
    assert "trust_remote_code" in by_code["loads_in"]["vLLM"] and by_zeros["loads_in"]["transformers"] == "yes, its own class"
    small, folder = tmp_path / "code" / "model", tmp_path / "zeros" / "model"
    written, before = (json.loads((place / "config.json").read_text()) for place in (folder, source))
    counts = [count for count in by_zeros["kept"] if count]
    zeros, name = written.pop(PADDED), Architecture(Checkpoint.open(folder)).count
    assert len(set(counts)) > 1 and written == before | {name: max(counts)} and not list(folder.glob("*.py"))
    assert {int(layer): len(experts) for layer, experts in zeros.items()} == {
        layer: max(counts) - count for layer, count in enumerate(by_zeros["kept"]) if 0 < count < max(counts)
    }
    tokens = calibration_samples(config(source, "").calibration, load_tokenizer(source), 260).tokens_ST
    torch.testing.assert_close(logits_of(load_stock(folder), tokens), logits_of(load_stock(small), tokens), rtol=1e-5, atol=1e-5)


def test_refused(tmp_path, checkpoint):
    for family in ("mixtral", "deepseek_v2"):
        with pytest.raises(StunError, match=f"experts.uneven=padded: the routers of {family} have no bias that could keep"):
            resolve_model(config(checkpoint(family), tmp_path / "run", experts=PADDING))
    both = ExpertsConfig(dropped=Dropped.novice, uneven=Uneven.padded)
    with pytest.raises(StunError, match="every layer keeps its number"):
        resolve_model(config(checkpoint("glm4_moe"), tmp_path / "run", experts=both))
    one_threshold = ExpertsConfig(ExpertsMethod.rank, budget=Budget["global"], uneven=Uneven.padded)
    with pytest.raises(StunError, match=r"fit=1GiB: experts\.uneven=padded fills all layers up to the most that one keeps"):
        source = checkpoint("glm4_moe", first_k_dense_replace=0)
        resolve_model(config(source, tmp_path / "run", experts=one_threshold, target=None, fit="1GiB"))
    padded = steep(tmp_path / "source", "glm4_moe")
    text = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(text | {PADDED: {"1": [6, 7]}}))
    with pytest.raises(
        StunError, match=r"experts of zeros that fill its layers up \(padded_experts\); prune what it was made from"
    ):
        resolve_model(config(padded, tmp_path / "run"))


@pytest.mark.slow
def test_prediction_head_keeps_what_the_layers_are_written_with(tmp_path, ranks):
    source = tmp_path / "source"
    with_head(source, "deepseek_v3", "model.layers.2.", "model.layers.3.")
    tensors = load_tensors(source)
    folder, plan, _ = run(source, tmp_path / "run", ranks, experts=PADDING)
    counts = [len(layer["kept"]) for layer in [*plan["layers"], *plan["mtp"]] if layer["kept"]]
    most = json.loads((folder / "config.json").read_text())["n_routed_experts"]
    assert counts[-1] == most == max(counts)
    written = load_tensors(folder)
    gates = [tensor for name, tensor in written.items() if name.endswith("mlp.gate.weight")]
    assert len(gates) == 3 and {len(gate) for gate in gates} == {most}
    assert tensors.keys() >= written.keys()


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_same_bytes_on_2_ranks(tmp_path, family):
    source = steep(tmp_path / "source", family)
    for ranks in (1, 2):
        own = {"experts__budget": "global", "experts__fraction": 0.5, "experts__uneven": "padded"}
        run_job("prune", settings(source, tmp_path / str(ranks), **own), ranks)
    assert PADDED in json.loads((tmp_path / "1" / "model" / "config.json").read_text())
    same_tensors(tmp_path / "1" / "model", tmp_path / "2" / "model")
