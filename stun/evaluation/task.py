"""Question-answer tasks: rows, prompts, and the rule by which a completion is correct."""

import random
import re
from dataclasses import dataclass
from decimal import Decimal

from transformers import PreTrainedTokenizerBase

from stun.config import StunError
from stun.data.rows import check_field, in_order, load_rows
from stun.data.tokenizer import check_vocabulary, check_yield, token_ids
from stun.evaluation.config import TaskConfig

_QUESTION = "{question}"
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


@dataclass(frozen=True)
class Row:
    """A prompt, its answer, and the group that it is scored with."""

    prompt: str
    answer: str
    group: str


def validate_task(cfg: TaskConfig) -> None:
    """Check the task's settings. Raises StunError."""
    for key, least in (("rows", 0), ("seed", 0), ("batch", 0), ("max_new_tokens", 1)):
        if getattr(cfg, key) < least:
            raise StunError(f"task.{key}={getattr(cfg, key)}: {least} or more")
    if _QUESTION not in cfg.prompt:
        raise StunError(f"task.prompt={cfg.prompt[:80]!r}: must contain {_QUESTION}")
    if not cfg.marker or not all(cfg.stop):
        raise StunError(f"task.marker={cfg.marker!r}, task.stop={list(cfg.stop)}: must not be empty texts")


def task_rows(cfg: TaskConfig) -> list[Row]:
    """Rows to ask, in the order of their file. Raises StunError if one has no question or no readable answer."""
    data = load_rows(cfg.path, "task.path", cfg.split, cfg.config)
    for key in ("question", "answer"):
        check_field(data, f"task.{key}", getattr(cfg, key), cfg.path)
    rows = list(in_order(data, cfg.path, "task.path"))
    if not rows:
        raise StunError(f"task.path={cfg.path}: has no rows")
    if cfg.rows > len(rows):
        raise StunError(f"task.rows={cfg.rows}: {cfg.path} has {len(rows)}")
    numbers = sorted(random.Random(cfg.seed).sample(range(len(rows)), cfg.rows)) if cfg.rows else range(len(rows))
    return [_row(number, rows[number], cfg) for number in numbers]


def _row(number: int, row: dict, cfg: TaskConfig) -> Row:
    where = f"task.path={cfg.path}: row {number}"
    for field in (cfg.question, cfg.answer):
        if row[field] is None:
            raise StunError(f"{where}: no value in field {field!r}; remove rows without a question or an answer")
        if not isinstance(row[field], str):
            raise StunError(f"{where}: field {field!r} is {type(row[field]).__name__}; a text is needed")
    if extract(row[cfg.answer], cfg) is None:
        kind = "number after " if cfg.number and cfg.marker in row[cfg.answer] else ""
        raise StunError(f"{where}: no {kind}{cfg.marker!r} in its answer; see task.marker")
    group = row.get(cfg.group)  # None if only some rows have one
    return Row(cfg.prompt.replace(_QUESTION, row[cfg.question]), row[cfg.answer], "all" if group is None else str(group))


def extract(text: str, cfg: TaskConfig) -> str | None:
    """Answer in a text: the rest of the line after the last marker, stripped; with cfg.number, the first number in it, in its
    shortest form. None if there is no answer."""
    _, marker, tail = text.rpartition(cfg.marker)
    tail = tail.strip().partition("\n")[0].strip()
    if not marker or not cfg.number:
        return tail if marker else None
    number = _NUMBER.search(tail)
    return format(Decimal(re.sub(r"[$,]", "", number[0])).normalize(), "f") if number else None


def completion(text: str, cfg: TaskConfig) -> str:
    """Generated text up to the first of the task's stop texts."""
    return text[: min((text.index(stop) for stop in cfg.stop if stop in text), default=len(text))]


def with_answer(row: Row) -> str:
    """Prompt and answer as one text, separated by white space."""
    joins = row.prompt[-1:].isspace() or row.answer[:1].isspace()
    return f"{row.prompt}{'' if joins else ' '}{row.answer}"


def encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int, key: str) -> list[list[int]]:
    """Token ids of texts. Raises StunError if a text has no tokens, or if the tokenizer does not fit the model."""
    tokens = token_ids(texts, key, tokenizer)
    check_yield(texts, tokens, tokenizer)
    for number, ids in enumerate(tokens):
        if not ids:
            raise StunError(f"{key}: row {number}: an empty text")
        check_vocabulary(ids, tokenizer, vocab_size)
    return tokens


def scores(right: list[bool], groups: list[str]) -> dict:
    """Share of correct rows by group, and the mean over the groups."""
    hits: dict[str, list[bool]] = {}
    for group, is_right in zip(groups, right, strict=True):
        hits.setdefault(group, []).append(is_right)
    exact = {group: sum(group_hits) / len(group_hits) for group, group_hits in hits.items()}
    return {"exact_match": exact, "average": sum(exact.values()) / len(exact), "right": right, "groups": groups}
