"""Questions and answers: prompts, and the rule by which a completion counts as right."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from decimal import Decimal

from transformers import PreTrainedTokenizerBase

from stun.config import StunError, TaskConfig
from stun.data import check_vocabulary, in_order, load_rows, token_ids

_QUESTION = "{question}"
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


@dataclass(frozen=True)
class Row:
    """A question as the model is asked it, its answer, and the group it is scored with."""

    prompt: str
    answer: str
    group: str


def validate_task(cfg: TaskConfig) -> None:
    """Refuse values that nothing could be asked with. Raises StunError."""
    for key, least in (("rows", 0), ("seed", 0), ("batch", 0), ("max_new_tokens", 1)):
        if getattr(cfg, key) < least:
            raise StunError(f"task.{key}={getattr(cfg, key)}: {least} or more")
    if _QUESTION not in cfg.prompt:
        raise StunError(f"task.prompt={cfg.prompt[:80]!r}: must contain {_QUESTION}")
    if not cfg.marker or not all(cfg.stop):
        raise StunError(f"task.marker={cfg.marker!r}, task.stop={list(cfg.stop)}: must not be empty texts")


def task_rows(cfg: TaskConfig) -> list[Row]:
    """The rows to ask, in the order of their file. Raises StunError where one lacks a question or a readable answer."""
    rows = list(in_order(load_rows(cfg.path, "task.path", cfg.split, cfg.config), cfg.path, "task.path"))
    if not rows:
        raise StunError(f"task.path={cfg.path}: has no rows")
    if cfg.rows > len(rows):
        raise StunError(f"task.rows={cfg.rows}: {cfg.path} has {len(rows)}")
    numbers = sorted(random.Random(cfg.seed).sample(range(len(rows)), cfg.rows)) if cfg.rows else range(len(rows))
    return [_row(number, rows[number], cfg) for number in numbers]


def _row(number: int, row: dict, cfg: TaskConfig) -> Row:
    where = f"task.path={cfg.path}: row {number}"
    if not all(isinstance(row.get(key), str) for key in (cfg.question, cfg.answer)):
        raise StunError(f"{where} needs the text fields {cfg.question!r} and {cfg.answer!r}")
    if extract(row[cfg.answer], cfg) is None:
        kind = "number after " if cfg.number and cfg.marker in row[cfg.answer] else ""
        raise StunError(f"{where}: no {kind}{cfg.marker!r} in its answer; see task.marker")
    group = row.get(cfg.group)  # of rows that lack it where others have it, None
    return Row(cfg.prompt.replace(_QUESTION, row[cfg.question]), row[cfg.answer], "all" if group is None else str(group))


def extract(text: str, cfg: TaskConfig) -> str | None:
    """What follows the last marker, up to the end of its line, without surrounding spaces; as a number the first one there, in
    its shortest form. None where there is no such thing."""
    _, found, tail = text.rpartition(cfg.marker)
    tail = tail.strip().partition("\n")[0].strip()
    if not found or not cfg.number:
        return tail if found else None
    number = _NUMBER.search(tail)
    return format(Decimal(re.sub(r"[$,]", "", number[0])).normalize(), "f") if number else None


def completion(text: str, cfg: TaskConfig) -> str:
    """A generated text up to the first of the task's stops."""
    return text[: min((text.index(stop) for stop in cfg.stop if stop in text), default=len(text))]


def with_answer(row: Row) -> str:
    """Prompt and answer as one text, with a space between two words."""
    joins = row.prompt[-1:].isspace() or row.answer[:1].isspace()
    return f"{row.prompt}{'' if joins else ' '}{row.answer}"


def encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int, key: str) -> list[list[int]]:
    """Token ids of texts. Raises StunError where a text gives none, or the tokenizer does not belong to the model."""
    found = token_ids(texts, key, tokenizer)
    for number, ids in enumerate(found):
        if not ids:
            raise StunError(f"{key}: row {number}: an empty text")
        check_vocabulary(ids, tokenizer, vocab_size)
    return found


def scores(right: list[bool], groups: list[str]) -> dict:
    """Share of right rows by group, and the mean of these."""
    hits: dict[str, list[bool]] = {}
    for group, is_right in zip(groups, right, strict=True):
        hits.setdefault(group, []).append(is_right)
    exact = {group: sum(own) / len(own) for group, own in hits.items()}
    return {"exact_match": exact, "average": sum(exact.values()) / len(exact), "right": right, "groups": groups}
