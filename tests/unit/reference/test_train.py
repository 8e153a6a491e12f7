"""Training of models to measure on: text of tasks and prose, balance of the experts."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.paths import REFERENCE
from stun.config import StunError
from stun.reference.balance import Loads, auxiliary_loss
from stun.reference.prose import PROSE, mixed, read_prose, tokens_of, up_to
from stun.reference.tasks import STRINGS, TASKS, generate
from stun.reference.train import TrainConfig, packed_batches, train, train_tokenizer

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
SMALL |= {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_layer_frequency": 1}


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> str:
    """A file of 2,000 paragraphs, one of them twice."""
    words, rng = ["one", "of", "the", "many", "rivers", "that", "nobody", "names"], random.Random(0)
    paragraphs = [" ".join(rng.choices(words, k=rng.randint(20, 80))) + f" {number}." for number in range(2000)]
    file = tmp_path_factory.mktemp("prose") / "prose.txt"
    file.write_text("\n\n".join([*paragraphs, paragraphs[0]]) + "\n")
    return str(file)


def rows(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_without_prose_the_bytes_are_those_of_the_embedded_model(tmp_path):
    train(TrainConfig(output=str(tmp_path), steps=1, batch=1, length=16, model=SMALL))
    for name in ("heldout.jsonl", "calibration.jsonl", "model/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (REFERENCE / name).read_bytes(), name
    half = rows(tmp_path / "calibration_half.jsonl")
    assert {row["task"] for row in half} == set(STRINGS) < set(TASKS)
    assert {row["question"] for row in half}.isdisjoint(row["question"] for row in rows(tmp_path / "heldout.jsonl"))
    assert not list(tmp_path.glob("*_prose.jsonl"))


@pytest.mark.slow
def test_half_of_the_text_is_prose(tmp_path, prose):
    """... of the calibration text and of the training; what is kept apart is in neither."""
    samples = {"calibration_samples": 60, "heldout_samples": 40}
    train(TrainConfig(output=str(tmp_path), steps=1, batch=1, length=16, model=SMALL, prose=prose, **samples))
    texts = {file.stem: rows(file) for file in tmp_path.glob("*.jsonl")}
    size = {name: sum(len(row["text"].split()) for row in part) for name, part in texts.items()}
    assert size["heldout_prose"] > 0.3 * size["heldout"] and size["calibration_prose"] > size["heldout_prose"]
    assert {row["task"] for row in texts["heldout"]} == set(TASKS) and {row["task"] for row in texts["calibration_prose"]} == {
        PROSE
    }
    apart, trained = ({sample.answer for sample in part} for part in read_prose(prose, 0))
    own = [row["text"] for name in ("heldout_prose", "calibration_prose") for row in texts[name]]
    own += [row["text"] for row in texts["calibration"] if row["task"] == PROSE]
    assert len(own) == len(set(own)) and set(own) <= apart and not apart & trained and len(apart | trained) == 2000

    tokenizer = train_tokenizer([row["text"] for row in texts["calibration"]], 400)
    _, paragraphs = read_prose(prose, 0)
    both = list(mixed(itertools.islice(generate(1), 100), iter(paragraphs), tokenizer))
    halves = [tokens_of([s for s in both if (s.task == PROSE) is own], tokenizer) for own in (True, False)]
    assert 0 <= halves[0] - halves[1] < max(tokens_of([s], tokenizer) for s in paragraphs)
    cfg = TrainConfig(batch=2, length=400, prose_weight=0.25)
    _, weights_BT = next(packed_batches(cfg, tokenizer, iter([both[0], *paragraphs])))
    assert set(weights_BT.flatten().tolist()) == {torch.tensor(cfg.prompt_weight).item(), 1.0, 0.25}


def test_bad_prose_is_refused(tmp_path):
    with pytest.raises(StunError, match="no such file"):
        read_prose(str(tmp_path / "none.txt"), 0)
    (tmp_path / "short.txt").write_text("one\n\ntwo")
    with pytest.raises(StunError, match="2 paragraphs"):
        read_prose(str(tmp_path / "short.txt"), 0)
    samples = list(itertools.islice(generate(0), 10))
    tokenizer = train_tokenizer([sample.answer for sample in samples], 260)
    with pytest.raises(StunError, match="too short"):
        up_to(iter(samples), tokens_of(samples, tokenizer) + 1, tokenizer)
    assert up_to(iter(samples), tokens_of(samples, tokenizer), tokenizer) == samples


@torch.no_grad()
def test_loads_and_the_bias_that_evens_them_out(checkpoint):
    """Loads are the router's own choices; a bias moves by one step, against its expert's load, and at last all are used."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("deepseek_v3"))
    chosen = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.e_score_correction_bias[0] = 3.0
            module.register_forward_hook(lambda _, __, out, name=name: chosen.update({name[: -len(".gate")]: out[2]}))
    loads, ids_BT = Loads(model), torch.randint(3, 259, (8, 32), generator=torch.Generator().manual_seed(0))
    model(ids_BT)
    assert chosen and loads.total_E.keys() == chosen.keys()
    for name, load_E in loads.total_E.items():
        assert load_E.tolist() == [(chosen[name] == expert).sum() for expert in range(8)] and load_E.sum() == 2 * ids_BT.numel()
    assert loads.smallest == min((choices == e).float().sum(1).mean() for choices in chosen.values() for e in range(8)) < 0.1
    before = {name: bias_E.clone() for name, bias_E in loads.biases_E.items()}
    loads.correct(0.01)
    for name, bias_E in loads.biases_E.items():
        signs = [(load < 64) - (load > 64) for load in loads.last_E[name].tolist()]
        assert torch.allclose(bias_E - before[name], 0.01 * torch.tensor(signs), atol=1e-6) and signs[0] == -1
    for turn in range(60):
        model(ids_BT)
        loads.correct(0.15 * 0.95**turn)
    loads.reset()
    model(ids_BT)
    assert loads.smallest > 0.15


@torch.no_grad()
@pytest.mark.parametrize(
    "family, per_layer", [("deepseek_v2", True), ("gpt_oss", True), ("gpt_oss", False), ("deepseek_v3", True)]
)
def test_auxiliary_loss(checkpoint, family, per_layer):
    """E sum_e f_e P_e, from the logits alone; nothing where biases balance."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    loads = Loads(model)
    out = model(torch.arange(3, 43)[None], output_router_logits=True)
    loss = auxiliary_loss(model, out, loads, per_layer)
    if family == "deepseek_v3":
        assert loss == 0
        return
    layers = out.router_logits if per_layer else [torch.cat(out.router_logits)]
    expected = []
    for logits_NE in layers:
        used_E = torch.zeros(8).index_add(0, logits_NE.topk(2).indices.flatten(), torch.ones(2 * len(logits_NE)))
        expected.append(8 * (used_E / len(logits_NE) * logits_NE.softmax(-1).mean(0)).sum())
    torch.testing.assert_close(loss, torch.stack(expected).mean())
