"""Calibration samples: texts of all sources, tokenized and packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from stun.config import CalibrationConfig, SourceConfig, StunError
from stun.data.chat import rendering
from stun.data.rows import check_field, in_order, load_rows
from stun.data.tokenizer import check_size, check_vocabulary, check_yield, token_ids

if TYPE_CHECKING:
    from datasets import Dataset

_CHATS = ("messages", "conversations", "conversation")
_PAIRS = [("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("instruction", "output")]


@dataclass(frozen=True)
class Reading:
    """Rows of one source read for its samples: `rows` of `total`, `missing` of them without a value; they gave `tokens`."""

    total: int
    rows: int
    missing: int
    tokens: int


@dataclass(frozen=True)
class Samples:
    """Calibration samples `tokens_ST` [S, T], grouped by source; `sources` maps a source to its number of samples.

    `readings` has what was read of each source, and `notes` what the log should say of it.
    """

    tokens_ST: torch.Tensor
    sources: dict[str, int]
    readings: list[Reading] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def batches(self, micro_batch: int) -> list[torch.Tensor]:
        """Micro-batches in order; none mixes samples of two sources."""
        parts = self.tokens_ST.split(list(self.sources.values()))
        return [batch for part in parts for batch in part.split(micro_batch)]

    def source_of_batch(self, micro_batch: int) -> list[int]:
        """Index of the source of every micro-batch."""
        counts = self.sources.values()
        return [number for number, count in enumerate(counts) for _ in range(-(-count // micro_batch))]

    @property
    def available(self) -> str:
        """Tokens of all sources' text: counted where all rows were read, else estimated from those read."""
        tokens = sum(reading.tokens * reading.total / reading.rows for reading in self.readings)
        if all(reading.rows == reading.total for reading in self.readings):
            return f"{tokens:,.0f}"
        return f"about {float(f'{tokens:.2g}'):,.0f}"


def calibration_samples(
    cfg: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, name: str = "calibration"
) -> Samples:
    """Samples of all sources, each source packed separately. Errors name the configuration `name`.

    Raises StunError if a source has no text or too little, or the tokenizer is incomplete or belongs to another model.
    """
    check_size(tokenizer, vocab_size)
    counts = _shares([source.weight for source in cfg.sources.values()], cfg.samples)
    parts, readings, notes = [], [], []
    for (part, source), count in zip(cfg.sources.items(), counts, strict=True):
        key = f"{name}.mixture.{part}" if cfg.mixture else name
        if not count:
            raise StunError(f"{key}.weight={source.weight}: gets none of {name}.samples={cfg.samples}")
        ids, reading = _read(source, key, count * cfg.length, cfg.seed, tokenizer)
        check_vocabulary(ids, tokenizer, vocab_size)
        parts.append(_packed(ids, reading, count, cfg.length, f"{key}.path={source.path}"))
        readings.append(reading)
        if reading.missing:
            rows = f"{reading.missing:,} of the {reading.rows:,} rows read"
            notes.append(f"{key}.path={source.path}: {rows} have no value in field {source.field!r}; they are skipped")
    return Samples(torch.cat(parts), dict(zip(cfg.sources, counts, strict=True)), readings, notes)


def _shares(weights: list[float], total: int) -> list[int]:
    """Split of `total` into integers proportional to `weights`, by the largest-remainder method."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _read(
    source: SourceConfig, key: str, need: int, seed: int | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], Reading]:
    """Token ids of a source's texts in order, each closed by the end-of-text token, up to the row that gives `need` of them."""
    where = f"{key}.path={source.path}"
    rows = load_rows(source.path, f"{key}.path", source.split)
    check_field(rows, f"{key}.field", source.field, source.path, _advice(rows.column_names, key))
    rows = rows if seed is None else rows.shuffle(seed=seed)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts, tokens, ids, count, missing = [], [], [], 0, 0
    for text in _texts(rows, source, key, tokenizer):
        count, missing = count + 1, missing + (text is None)
        if text and text.strip():
            texts.append(text)
            tokens.append(token_ids(text, where, tokenizer))
            ids += tokens[-1] + end
        if len(ids) >= need:
            break
    if not texts:
        raise StunError(f"{where}: no text in field {source.field!r}")
    check_yield(texts, tokens, tokenizer)
    return ids, Reading(len(rows), count, missing, len(ids))


def _advice(names: list[str], key: str) -> str:
    """Field that was probably meant, for rows with the fields `names`."""
    for chat in _CHATS:
        if chat in names:
            return f"; did you mean {key}.field={chat}?"
    pair = next((pair for pair in _PAIRS if set(pair) <= set(names)), None)
    return f"; write {pair[0]} and {pair[1]} into one field first, as a text or as chat messages" if pair else ""


def _texts(rows: Dataset, source: SourceConfig, key: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str | None]:
    """Texts of all rows, None where a row has no value."""
    with rendering(tokenizer) as rendered:
        for number, content in enumerate(in_order(rows[source.field], source.path, f"{key}.path")):
            where = f"{key}.path={source.path}: row {number}: field {source.field!r}"
            if isinstance(content, list):
                content = rendered(content, where)
            if not isinstance(content, str | None):
                raise StunError(f"{where} is {type(content).__name__}; a text or chat messages are needed")
            yield content


def _packed(ids: list[int], reading: Reading, samples: int, length: int, where: str) -> torch.Tensor:
    """[samples, length] token ids, without padding. Raises StunError if there are too few."""
    need = samples * length
    if len(ids) < need:
        name = where.partition(".")[0]
        without = f" ({reading.missing:,} of {reading.rows:,} rows have no value)" if reading.missing else ""
        raise StunError(
            f"{where}: {len(ids)} tokens{without}, but {samples} samples of {name}.length={length} need {need}; "
            f"at most {len(ids) // length} samples of this length"
        )
    return torch.tensor(ids[:need]).view(samples, length)
