"""Samples: rows without a value, the size of the text, chats of both forms."""

from __future__ import annotations

import json

import pytest

from helpers.zoo import byte_tokenizer
from stun.config import CalibrationConfig, SourceConfig, StunError
from stun.data.samples import calibration_samples

TEXT = "The quick brown fox jumps over the lazy dog."
SAID = ["Be brief.", "Why?", TEXT]
MESSAGES = [{"role": role, "content": said} for role, said in zip(("system", "user", "assistant"), SAID, strict=True)]
SHAREGPT = [{"from": speaker, "value": said} for speaker, said in zip(("system", "human", "gpt"), SAID, strict=True)]


def file_of(tmp_path, *rows: dict, name="text.jsonl") -> str:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / name)


def samples_of(path: str, samples=2, length=40, tokenizer=None, **changes):
    cfg = CalibrationConfig(path, samples=samples, length=length, **changes)
    return calibration_samples(cfg, tokenizer or byte_tokenizer(), 260)


def test_rows_without_a_value_are_skipped_and_counted(tmp_path):
    row = {"text": TEXT}
    whole = samples_of(file_of(tmp_path, *[row] * 4))
    holes = file_of(tmp_path, {"text": None}, row, {"body": 1}, {"text": ""}, *[row] * 3, name="holes.jsonl")
    found = samples_of(holes)
    assert found.tokens_ST.equal(whole.tokens_ST) and not whole.notes
    assert found.notes == [f"calibration.path={holes}: 2 of the 5 rows read have no value in field 'text'; they are skipped"]
    with pytest.raises(StunError, match=r"180 tokens \(2 of 7 rows have no value\), but 5 samples"):
        samples_of(holes, samples=5)
    with pytest.raises(StunError, match="no text in field 'text'"):
        samples_of(file_of(tmp_path, {"text": None}, {"text": None}, name="none.jsonl"))


def test_a_mixture_says_which_source_has_the_holes(tmp_path):
    holes = file_of(tmp_path, {"text": None}, *[{"text": TEXT}] * 3)
    parts = {"a": SourceConfig(file_of(tmp_path, *[{"text": TEXT}] * 3, name="a.jsonl")), "b": SourceConfig(holes)}
    (note,) = samples_of("", mixture=parts).notes
    assert note.startswith(f"calibration.mixture.b.path={holes}: 1 of the 2 rows")


def test_the_size_of_the_text(tmp_path):
    """Counted to the end, or estimated from the rows that were needed."""
    path = file_of(tmp_path, *[{"text": TEXT}] * 100)
    tokens = 100 * (len(TEXT) + 1)
    assert samples_of(path, samples=112).available == f"{tokens:,}" == "4,500"
    assert samples_of(path).available == "about 4,500"


def test_sharegpt_is_the_same_chat(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

    def tokens_of(messages: list) -> list[int]:
        path = file_of(tmp_path, {"conversations": messages})
        return samples_of(path, 1, 85, tokenizer, field="conversations").tokens_ST[0].tolist()

    assert tokens_of(SHAREGPT) == tokens_of(MESSAGES)
    assert "Be brief.\nuser: Why?\nassistant: The quick" in tokenizer.decode(tokens_of(SHAREGPT))
    with pytest.raises(StunError, match=r"row 0: .*from \(human, .*gpt.*\) and value; one is .*bard"):
        tokens_of([{"from": "bard", "value": "x"}])
