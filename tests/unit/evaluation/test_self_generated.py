"""Text that the model itself writes: its tokens' frequencies, its file, the same on any number of ranks."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedTokenizerFast

import stun.evaluation.self_generated
from helpers.launches import run_job
from helpers.pages import page
from helpers.paths import REFERENCE
from stun.checkpoint.reader import Checkpoint
from stun.config import CalibrationConfig, ModelConfig, StunError
from stun.data.samples import calibration_samples
from stun.data.tokenizer import load_tokenizer
from stun.evaluation.config import GenerateConfig
from stun.evaluation.generate import Decoding, sampled
from stun.evaluation.memory import generation_capacity
from stun.evaluation.self_generated import _start, _text, generate_text
from stun.model.architecture import Architecture
from stun.reference.tasks import NAMES
from stun.run.lock import let_go
from stun.settings.compose import composed

MODEL = REFERENCE / "model"


def test_tokens_are_as_frequent_as_they_are_likely():
    """Over an even grid of draws, each to within one; a token of no probability is never drawn, not even at the ends."""
    logits_V = torch.tensor([-torch.inf, 1.0, -2.0, 0.5, -torch.inf])
    grid_N = torch.arange(1000, dtype=torch.float64) / 1000
    tokens_N = sampled(logits_V.expand(1001, 5), torch.cat([grid_N, torch.tensor([1 - 2**-53], dtype=torch.float64)]))
    counts_V = torch.bincount(tokens_N[:-1], minlength=5)
    assert (counts_V - 1000 * logits_V.double().softmax(0)).abs().max() <= 1
    assert not counts_V[[0, 4]].any() and tokens_N[-1] == 3


def asking(output: Path, **changes) -> GenerateConfig:
    return replace(GenerateConfig(ModelConfig(str(MODEL)), str(output), texts=12, tokens=16, batch=12), **changes)


def rows(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def test_texts_are_of_the_models_tasks(ranks, tmp_path, capsys):
    """... all different, and can be calibrated on; the same command once more does nothing, another seed gives other texts."""
    generate_text(asking(tmp_path / "own.jsonl"), ranks)
    texts = rows(tmp_path / "own.jsonl")
    beginnings = (*NAMES, "What is", "Reverse", "Sort", "Count", "Upper case", "Maximum")
    assert len(set(texts)) == 12 and sum(text.startswith(beginnings) for text in texts) >= 11
    cfg = CalibrationConfig(str(tmp_path / "own.jsonl"), samples=8, length=16)
    assert calibration_samples(cfg, load_tokenizer(MODEL), 4096).tokens_ST.shape == (8, 16)
    before = (tmp_path / "own.jsonl").stat()
    (tmp_path / "own.jsonl.partial").mkdir()  # as of a launch that was killed before it had removed it
    (tmp_path / "own.jsonl.partial" / "request.json").write_text("{}")
    generate_text(asking(tmp_path / "own.jsonl"), ranks)
    assert "complete already" in capsys.readouterr().out and (tmp_path / "own.jsonl").stat() == before
    assert not (tmp_path / "own.jsonl.partial").exists()
    generate_text(asking(tmp_path / "other.jsonl", seed=1), ranks)
    assert not set(rows(tmp_path / "other.jsonl")) & set(texts)
    generate_text(asking(tmp_path / "sort.jsonl", start="Sort: "), ranks)
    assert all(text.startswith("Sort: ") for text in rows(tmp_path / "sort.jsonl"))


def test_an_interrupted_call_goes_on_to_the_same_bytes(ranks, tmp_path, monkeypatch):
    small = {"tokens": 6, "batch": 5}
    generate_text(asking(tmp_path / "whole.jsonl", **small), ranks)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stun.evaluation.self_generated, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        generate_text(asking(tmp_path / "own.jsonl", **small), ranks)
    let_go()
    finished = tmp_path / "own.jsonl.partial" / "generate-5"
    assert len(list(finished.glob("tokens-*.json"))) == 3
    (finished / "tokens-000001.json").unlink()
    with pytest.raises(StunError, match=r"holds another evaluation \(seed: 0 there, 1 now\)"):
        generate_text(asking(tmp_path / "own.jsonl", **small, seed=1), ranks)
    generate_text(asking(tmp_path / "own.jsonl", **small), ranks)
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["own.jsonl", "whole.jsonl"]


def spaced_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Words with the space before them, as SentencePiece has them: the first of a text is decoded without it."""
    words = ["<unk>", "<s>", "</s>", "\u2581Sort:", "\u2581the", "\u2581cat"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


@pytest.mark.parametrize(
    ("start", "added", "prompt"),
    [
        ("", "$A", [2]),
        ("", "<s> $A </s>", [2, 1]),
        ("Sort:", "$A </s>", [3]),
        ("Sort:</s>the", "<s> $A", [1, 3, 2, 4]),  # the end of a turn, in chat templates
        ("</s>", "$A", [2]),
    ],
)
def test_what_is_gone_on_from(tmp_path, start, added, prompt):
    """All that `start` says, without the end that some tokenizers add."""
    tokenizer = spaced_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(added, special_tokens=[("<s>", 1), ("</s>", 2)])
    assert _start(asking(tmp_path / "own.jsonl", start=start), tokenizer, 6) == prompt


def test_nothing_to_go_on_from(tmp_path):
    with pytest.raises(StunError, match="has no end-of-text token; give a text"):
        _start(asking(tmp_path / "own.jsonl"), spaced_tokenizer(), 6)


def test_the_space_after_the_start_stays():
    tokenizer = spaced_tokenizer(eos_token="</s>")
    assert _text("Sort:", [3], [4, 5], tokenizer) == "Sort: the cat"
    assert _text("", [2], [4, 5], tokenizer) == "the cat"


def test_the_head_of_a_turn_in_the_documentation():
    """... reaches the job with its line's end."""
    (word,) = re.findall(r"`(\$'start=[^`]*)`", page("runs"))
    said = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, text=True, check=True).stdout
    assert composed("generate", ["model.path=model", "output=own.jsonl", said]).start == "<|im_start|>user\n"


def test_too_many_at_once_are_refused(ranks, tmp_path, monkeypatch):
    """... before anything is written, so that the same command with a smaller batch can start."""
    monkeypatch.setattr("stun.evaluation.memory.free_memory", lambda ranks: 2**22)
    sizes = [generation_capacity(Architecture(Checkpoint.open(MODEL)), [1] * 12, 16, 12, ranks).most]
    with pytest.raises(StunError, match=r"out of memory: batch=12: at most 0 texts of 16 tokens fit at once; a smaller batch"):
        generate_text(asking(tmp_path / "own.jsonl", batch=12), ranks)
    assert not list(tmp_path.iterdir())
    for free in (2**24, 2**25):
        monkeypatch.setattr("stun.evaluation.memory.free_memory", lambda ranks, free=free: free)
        sizes.append(generation_capacity(Architecture(Checkpoint.open(MODEL)), [1] * 12, 16, 12, ranks).most)
    assert sizes == sorted(set(sizes))


def test_logits_that_are_not_finite_are_refused():
    decoding = Decoding(GenerationConfig(), spaced_tokenizer(), 2, [], torch.zeros(2, 2, dtype=torch.float64))
    logits_BV = torch.zeros(2, 6)
    assert decoding.next_tokens(logits_BV, [0, 1], 1).tolist() == [0, 0]
    logits_BV[1, 3] = torch.nan
    with pytest.raises(StunError, match="the model's logits of token 2 are not finite"):
        decoding.next_tokens(logits_BV, [0, 1], 1)


@pytest.mark.ranks
@pytest.mark.parametrize(("family", "world"), [("arctic", 2), ("gpt_oss", 4)])
def test_the_same_bytes_on_any_number_of_ranks(checkpoint, ranks, tmp_path, family, world):
    model = ModelConfig(str(checkpoint(family)))
    generate_text(asking(tmp_path / "one.jsonl", model=model, batch=5), ranks)
    own = [f"model.path={model.path}", f"output={tmp_path}/more.jsonl", "texts=12", "tokens=16", "batch=5"]
    run_job("generate", own, world)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "more.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": 0}, r"texts=0: 1 or more"),
        ({"tokens": 1}, r"tokens=1: 2 or more"),
        ({"seed": -1}, r"seed=-1: 0 or more"),
        ({"seed": 2**64}, r"seed=\d+: a number below 2\^63 is needed"),
        ({"batch": 0}, r"batch=0: 1 or more"),
        ({"output": "own.txt"}, r"output=own.txt: a name that ends in .jsonl is needed"),
        ({"model": ModelConfig("nowhere/at/all")}, r"nowhere/at/all"),
    ],
)
def test_bad_requests_are_refused(ranks, tmp_path, changes, message):
    with pytest.raises(StunError, match=message):
        generate_text(replace(asking(tmp_path / "own.jsonl"), **changes), ranks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["my notes", "[1]", "", '{"text": "mine"}'])
def test_a_file_of_somebody_else_stays(ranks, tmp_path, content):
    file = tmp_path / "own.jsonl"
    file.write_text(content)
    with pytest.raises(StunError, match=r"own.jsonl: was not written by this command; choose another file"):
        generate_text(asking(file), ranks)
    assert file.read_text() == content and len(list(tmp_path.iterdir())) == 1
    file.unlink()
    file.symlink_to("nowhere")
    with pytest.raises(StunError, match=r"own.jsonl: was not written by this command"):
        generate_text(asking(file), ranks)
