"""Tokenizers that say next to nothing are refused, small ones that say everything are not."""

from __future__ import annotations

import json
import os

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from helpers.paths import REFERENCE, TEXT
from helpers.zoo import byte_tokenizer
from stun.config import CalibrationConfig, StunError
from stun.data.samples import calibration_samples
from stun.data.tokenizer import load_tokenizer

WORDS = ["What", "is", "?", "+", "-", "How", "many", "1", "2", "3"]


def words(vocabulary: list[str], **special) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; the first one stands for all that are not known."""
    model = models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token=vocabulary[0])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def sampled(folder, vocab_size: int, path=TEXT):
    return calibration_samples(CalibrationConfig(str(path), samples=2, length=64), load_tokenizer(folder), vocab_size)


BAD = {
    "without its vocabulary": (
        lambda: byte_tokenizer(),
        "tokenizer.json",
        260,
        r"cannot be loaded: .* one of: \(1\) a",
    ),
    "tiny beside the model's": (lambda: words(["[UNK]", *WORDS]), "", 32_000, r"has 11 tokens, the model's vocabulary 32,000"),
    "mostly unknown": (lambda: words(["[UNK]", *WORDS], unk_token="[UNK]"), "", 11, r"makes [\d,]+ tokens \(\d+ different\)"),
    "all alike": (lambda: words(["[UNK]"]), "", 1, r"\(1 different\) and 0 unknown"),
    "nothing but ends": (lambda: words(["</s>"], eos_token="</s>"), "", 1, r"makes 0 tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_it_yields_next_to_nothing(tmp_path, name):
    make, missing, vocab_size, says = BAD[name]
    make().save_pretrained(tmp_path)
    (tmp_path / missing).unlink() if missing else None
    with pytest.raises(StunError, match=says) as caught:
        sampled(tmp_path, vocab_size)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_it_is_missing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "vocab_size": 151_936}))
    with pytest.raises(StunError, match=f"{tmp_path}: has no tokenizer; copy its files .*tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["bytes", "bytes beside a large vocabulary", "ByT5, which has no files", "reference"])
@pytest.mark.parametrize("text", ["English", "Chinese", "one letter"])
def test_no_false_alarm(tmp_path, name, text):
    path = tmp_path / "text.jsonl"
    contents = {"Chinese": "".join(map(chr, range(0x4E00, 0x5E00))), "one letter": "a" * 400}
    path.write_text(TEXT.read_text() if text == "English" else json.dumps({"text": contents[text]}) + "\n")
    folder, vocab_size = tmp_path / "model", 400 if "ByT5" in name else 50_000 if "large" in name else 512
    if name == "reference":
        folder = REFERENCE / "model"
    else:
        (ByT5Tokenizer() if "ByT5" in name else byte_tokenizer()).save_pretrained(folder)
        (folder / "config.json").write_text("{}")
    assert sampled(folder, vocab_size, path).tokens_ST.shape == (2, 64)


def test_it_is_tried_once_as_long_as_no_file_changes(tmp_path, monkeypatch):
    """In a child, which takes as long again as the loading."""
    forks, fork = [], os.fork
    monkeypatch.setattr(os, "fork", lambda: forks.append(None) or fork())
    byte_tokenizer().save_pretrained(tmp_path)
    for _ in range(3):
        load_tokenizer(tmp_path)
    assert len(forks) == 1
    file = tmp_path / "tokenizer_config.json"
    file.write_text(file.read_text().replace(":", ": ", 1))
    load_tokenizer(tmp_path)
    assert len(forks) == 2
