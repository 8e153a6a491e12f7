"""Every family: the stream against transformers' own forward, and what is written against the stock classes."""

from __future__ import annotations

import contextlib
import json
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.family_runs import CALIBRATION, ON_TWO, RUNS, run
from helpers.launches import run_warm
from helpers.stock import check_statistics, forbid, load_stock, logits_of
from helpers.tensors import same_tensors
from helpers.zoo import FAMILIES, make_checkpoint
from stun.checkpoint.reader import Checkpoint
from stun.data.samples import calibration_samples
from stun.data.tokenizer import load_tokenizer
from stun.model.architecture import Architecture
from stun.stream.layer_stream import LayerStream, embed, even_owners

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """(sources, runs): a checkpoint of every family, and its runs on two ranks, made by one launch."""
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make_checkpoint(folder / "sources" / family, family)
    run_warm(["-m", "helpers.family_runs", folder / "sources", folder / "runs", *FAMILIES], 2)
    return folder / "sources", folder / "runs"


@pytest.mark.parametrize("family", FAMILIES)
def test_family(two_ranks, ranks, tmp_path, family):
    source, runs = two_ranks[0] / family, two_ranks[1] / family
    assert len(list(source.glob("model-*.safetensors"))) > 3, "several shards"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, experts_implementation="eager").eval()
    tokens = calibration_samples(CALIBRATION, load_tokenizer(source), 260).tokens_ST
    arch = Architecture(Checkpoint.open(source))
    check_logits(arch, model, tokens, ranks)
    check_statistics(arch, model, tokens, ranks, tmp_path / "observed", family)
    for name in RUNS:
        run(name, source, tmp_path / name, ranks)
        if name in ON_TWO:
            same_tensors(tmp_path / name / "model", runs / name / "model")
            assert (tmp_path / name / "plan.json").read_bytes() == (runs / name / "plan.json").read_bytes()
    same_tensors(source, tmp_path / "identity" / "model")
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "identity/model/config.json").read_text())
    check_survivors(arch, model, tokens, tmp_path / "experts")
    summary = json.loads((tmp_path / "both" / "manifest.json").read_text())["summary"]
    assert abs(summary["sparsity"] - 0.4) < 1e-4 and sum(summary["kept"]) < sum(summary["experts"])
    load_stock(tmp_path / "both" / "model")


def check_logits(arch, model, tokens, ranks):
    """The stream's last hidden states, given to the full model's own norm and head, are its own logits."""
    states = embed(arch, ranks, tokens.split(CALIBRATION.micro_batch), arch.source.read)
    stream = LayerStream(arch, ranks, arch.layers, [even_owners(x, 1) for x in arch.layers])
    for layer in stream:
        stream.build(layer)
        states = stream.run(layer, states)
    expected, hidden = logits_of(model, tokens), iter(states.hidden)
    with contextlib.ExitStack() as replaced:
        for layer in model.base_model.layers:
            replaced.enter_context(mock.patch.object(layer, "forward", lambda hidden_states, *_, **__: hidden_states))
        last = model.base_model.layers[-1]
        replaced.enter_context(mock.patch.object(last, "forward", lambda *_, **__: next(hidden)))
        streamed = logits_of(model, tokens)
    assert expected.std() > 0.1, "the logits must vary, or equality proves nothing"
    torch.testing.assert_close(streamed, expected, atol=1e-4, rtol=1e-4)


def check_survivors(arch, model, tokens, folder):
    """A checkpoint without some experts computes what the full model does when its routers cannot choose them.

    The difference is that of a product with fewer router rows, which a matrix library may sum in another order: in float32 up to
    1.6e-4 for one family on an AMD CPU, so it is computed in float64.
    """
    plan = json.loads((folder / "plan.json").read_text())
    kept = {index: layer["kept"] for index, layer in enumerate(plan["layers"]) if layer["experts"]}
    assert kept and {len(k) for k in kept.values()} == {6}
    pruned = load_stock(folder / "model").double()
    model.double()
    with contextlib.ExitStack() as replaced:
        for index, survivors in kept.items():
            forbid(model.base_model.layers[index], survivors, replaced)
        expected = logits_of(model, tokens)
    torch.testing.assert_close(logits_of(pruned, tokens), expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits_of(model, tokens)).abs().max() > 1e-3, "the dropped experts mattered"
