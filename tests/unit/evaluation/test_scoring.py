"""Scores from the stream against full models of transformers, row by row and without padding."""

from __future__ import annotations

import json
import math

import pytest
import torch

from helpers.forms import damaged
from helpers.stock import full
from helpers.tensors import load_tensors
from helpers.zoo import SHAPE
from stun.checkpoint.reader import Checkpoint
from stun.config import StunError
from stun.evaluation.perplexity import _scores, score
from stun.model.architecture import Architecture
from stun.stream.layer_stream import embed

FAMILIES = ["arctic", "deepseek_v3", "gpt_oss", "jamba", "lfm2_moe", "qwen3_next", "phimoe"]
# Lengths of which no two are equal, and one of a single token, of which nothing is predicted.
LENGTHS = [17, 3, 41, 1, 29, 8, 12]


@pytest.mark.parametrize("totals", [[10.0, math.nan], [10.0, 1e5], [10.0, 5.0, math.inf, 3.0]])
def test_predictions_without_a_perplexity_are_refused(totals):
    """A file with them could not be read again."""
    with pytest.raises(StunError, match="there is no perplexity"):
        _scores(totals, [])


def sequences() -> list[list[int]]:
    torch.manual_seed(3)
    return [torch.randint(3, 259, (length,)).tolist() for length in LENGTHS]


def expected(model, dense, rows) -> dict:
    nll = kl = same = tokens = 0
    errors: list[list[float]] = []
    for ids in rows:
        (log_q, own), (log_p, other) = full(model, ids), full(dense, ids)
        errors.append([[float((a - b).square().sum()), float(b.square().sum())] for a, b in zip(own, other, strict=True)])
        log_q, log_p, target = log_q[:-1], log_p[:-1], torch.tensor(ids[1:], dtype=torch.int64)
        nll -= float(log_q.gather(1, target[:, None]).sum())
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        tokens += len(target)
    sums = torch.tensor(errors).sum(0)
    return {"nll": nll / tokens, "kl": kl / tokens, "top1": same / tokens, "tokens": tokens, "errors": sums[:, 0] / sums[:, 1]}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_full_models(checkpoint, ranks, tmp_path, family):
    dense, model, rows = checkpoint(family), damaged(checkpoint(family), tmp_path / "model"), sequences()
    wanted = expected(model, dense, rows)
    own, other = (Architecture(Checkpoint.open(folder)) for folder in (model, dense))
    found = score(own, other, rows, 3, ranks, phase(tmp_path / "pair"))
    agreement = found["agreement"]
    assert found["tokens"] == agreement["tokens"] == wanted["tokens"] == sum(LENGTHS) - len(LENGTHS)
    assert math.log(found["perplexity"]) == pytest.approx(wanted["nll"], rel=1e-5)
    assert agreement["kl"] == pytest.approx(wanted["kl"], rel=1e-3) and agreement["kl"] > 0.01
    assert agreement["top1"] == wanted["top1"] < 1
    torch.testing.assert_close(torch.tensor(found["layer_error"]), wanted["errors"], rtol=1e-3, atol=1e-6)
    alone = score(own, None, rows, 3, ranks, phase(tmp_path / "alone"))
    assert alone == {key: found[key] for key in ("perplexity", "tokens")}
    itself = score(other, Architecture(Checkpoint.open(dense)), rows, 3, ranks, phase(tmp_path / "itself"))
    assert itself["agreement"]["kl"] == 0 and itself["agreement"]["top1"] == 1 and set(itself["layer_error"]) == {0.0}
    assert set(itself) == {"perplexity", "tokens", "agreement", "layer_error"}


def phase(folder):
    for part in ("progress", "hidden"):
        (folder / part).mkdir(parents=True)
    return folder


def test_tied_embeddings_and_no_more_logits_than_asked_for(checkpoint, ranks, tmp_path, monkeypatch):
    """A checkpoint without a tensor for its head; the head sees a few tokens at a time, whatever the batch."""
    dense = checkpoint("granitemoe", tie_word_embeddings=True)
    assert not [name for name in load_tensors(dense) if "lm_head" in name]
    arch, rows = Architecture(Checkpoint.open(dense)), sequences()
    whole = score(arch, None, rows, 7, ranks, phase(tmp_path / "whole"))
    assert math.log(whole["perplexity"]) == pytest.approx(expected(dense, dense, rows)["nll"], rel=1e-5)
    sizes, leave = [], Architecture.leave
    monkeypatch.setattr("stun.evaluation.perplexity._LOGITS", 5 * SHAPE["vocab_size"])
    monkeypatch.setattr(Architecture, "leave", lambda self, hidden_ND: sizes.append(len(hidden_ND)) or leave(self, hidden_ND))
    parts = score(arch, None, rows, 7, ranks, phase(tmp_path / "parts"))
    assert max(sizes) == 5 and sum(sizes) == whole["tokens"]
    assert math.log(parts["perplexity"]) == pytest.approx(math.log(whole["perplexity"]), rel=1e-6)


def test_interrupted_scoring_goes_on(checkpoint, ranks, tmp_path):
    """As it is found after a kill: the last layers' entries are not there. Only these layers are read again."""
    dense, model, rows = checkpoint("qwen3_moe"), damaged(checkpoint("qwen3_moe"), tmp_path / "model"), sequences()

    def once(folder) -> tuple[dict, int]:
        own, other = (Architecture(Checkpoint.open(path)) for path in (model, dense))
        return score(own, other, rows, 3, ranks, folder), own.source.bytes_read

    wanted, nbytes = once(phase(tmp_path / "run"))
    for name in ("score-00002-0-of-1.json", "dense-00002-0-of-1.json", "dense-00001-0-of-1.json"):
        (tmp_path / "run" / "progress" / name).unlink()
    found, less = once(tmp_path / "run")
    assert found == wanted and less < nbytes
    assert once(tmp_path / "run") == (wanted, once(tmp_path / "run")[1])
    entry = tmp_path / "run" / "progress" / "score-00000-0-of-1.json"
    entry.write_text(json.dumps({**json.loads(entry.read_text()), "error": [[1, "x"]]}))
    from stun.config import StunError

    with pytest.raises(StunError, match=r"error\.0: must be two numbers"):
        once(tmp_path / "run")


def test_masks_do_not_grow_with_the_rows(checkpoint, ranks):
    """Those of eager attention, of which every length has its own."""
    arch = Architecture(Checkpoint.open(checkpoint("gpt_oss")))
    sizes = {}
    for rows in (1, 8):
        states = embed(arch, ranks, [torch.ones(rows, length, dtype=torch.int64) for length in (30, 31)], arch.source.read)
        masks = [layer["attention_mask"] for arguments in states.arguments for layer in arguments]
        assert {mask.shape[-1] for mask in masks} == {30, 31} and all(len(mask) == rows for mask in masks)
        sizes[rows] = sum({id(storage): storage.nbytes() for storage in (m.untyped_storage() for m in masks)}.values())
    assert sizes[1] == sizes[8] > 0
