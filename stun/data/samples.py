"""Calibration and evaluation samples, loaded through `datasets` and tokenized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stun.config import CalibrationConfig, SourceConfig, StunError
from stun.files import check_folder, parse_json

if TYPE_CHECKING:
    from datasets import Dataset

_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def load_rows(path: str, key: str, split: str = "train", config: str = "") -> Dataset:
    """Rows of a local file or a hub dataset (`config` names one of its configurations). Errors name the setting `key`.
    Raises StunError."""
    file = Path(path)
    if file.is_file() and file.suffix not in _LOADERS:
        raise StunError(f"{key}={path}: unknown file type; known: {', '.join(_LOADERS)}")
    looks_local = file.suffix in _LOADERS or path.startswith(("/", "."))
    if looks_local and not file.is_file():
        raise StunError(f"{key}={path}: no such file")
    if looks_local and not file.stat().st_size:
        raise StunError(f"{key}={path}: the file is empty")
    # Imported here: it takes seconds and 100 MiB, and only the first rank reads.
    from datasets import load_dataset

    try:
        if looks_local:
            return load_dataset(_LOADERS[file.suffix], data_files=str(file), split="train")
        return load_dataset(path, config or None, split=split)
    except Exception as error:  # datasets raises many kinds, all of them about this path
        where = _broken_line(file) if looks_local else ""
        raise StunError(f"{key}={path}: datasets cannot load it: {where}{_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def in_order(entries: Iterable, path: str, key: str) -> Iterator:
    """Entries of a data set, decoded one by one. Raises StunError if one is not UTF-8."""
    try:
        yield from entries
    except UnicodeDecodeError as error:
        raise StunError(f"{key}={path}: {_broken_line(Path(path))}{error}") from error


def _broken_line(file: Path) -> str:
    """First line of a .jsonl file that is not a JSON object, or whose field changes its type; empty if there is none."""
    kinds: dict[str, type] = {}
    if file.suffix != ".jsonl":
        return ""
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            content = parse_json(line, f"line {number}") if line.strip() else {}
        except StunError as error:
            return f"{error}; "
        if not isinstance(content, dict):
            return f"line {number} is not a JSON object; "
        for name, value in content.items():
            if value is not None and kinds.setdefault(name, type(value)) is not type(value):
                return f"line {number}: field {name!r} is {type(value).__name__}, above it {kinds[name].__name__}; "
    return ""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint; code in the checkpoint is not run. Raises StunError."""
    check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds, all of them about these files
        files = ", ".join(sorted(file.name for file in folder.glob("*token*.json"))) or "no tokenizer.json"
        raise StunError(f"{folder}: its tokenizer ({files}) cannot be loaded: {_first_line(error)}") from error


@dataclass(frozen=True)
class Samples:
    """Calibration samples `tokens_ST` [S, T], grouped by source; `sources` maps a source to its number of samples."""

    tokens_ST: torch.Tensor
    sources: dict[str, int]

    def batches(self, micro_batch: int) -> list[torch.Tensor]:
        """Micro-batches in order; none mixes samples of two sources."""
        parts = self.tokens_ST.split(list(self.sources.values()))
        return [batch for part in parts for batch in part.split(micro_batch)]

    def source_of_batch(self, micro_batch: int) -> list[int]:
        """Index of the source of every micro-batch."""
        counts = self.sources.values()
        return [number for number, count in enumerate(counts) for _ in range(-(-count // micro_batch))]


def _texts(rows: Dataset, source: SourceConfig, key: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for number, content in enumerate(in_order(rows[source.field], source.path, f"{key}.path")):
        if isinstance(content, list):
            content = _rendered(content, f"{key}.path={source.path}: row {number}: field {source.field!r}", tokenizer)
        if not isinstance(content, str):
            kind = type(content).__name__
            raise StunError(
                f"{key}.path={source.path}: row {number}: field {source.field!r} is {kind}; a text or chat messages are needed"
            )
        yield content


def _rendered(messages: list, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Chat messages as one text. The checkpoint's template is a program; transformers runs it in a sandbox."""
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        has_content = isinstance(fields.get("content"), (str, list)) or fields.get("tool_calls")
        if not isinstance(fields.get("role"), str) or not has_content:
            raise StunError(f"{where}: chat messages need a role and a content, a text or its parts; one is {str(message)[:80]}")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # whatever the template does
        raise StunError(f"{where}: the chat template of {tokenizer.name_or_path} fails: {_first_line(error)}") from error


def token_ids(text: str | list[str], where: str, tokenizer: PreTrainedTokenizerBase) -> list:
    """Token ids of a text, or of each text in a list. Raises StunError."""
    try:
        return tokenizer(text)["input_ids"]
    except Exception as error:  # tokenizers raises a bare one
        raise StunError(f"{where}: the tokenizer of {tokenizer.name_or_path} fails: {_first_line(error)}") from error


def check_vocabulary(ids: list[int], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise StunError if token ids exceed the model's vocabulary: the tokenizer is another model's."""
    if max(ids) >= vocab_size:
        name = f"the tokenizer of {tokenizer.name_or_path}"
        raise StunError(f"{name} yields id {max(ids)}, the model's vocabulary has {vocab_size} (config.json: vocab_size)")


def _shares(weights: list[float], total: int) -> list[int]:
    """Split of `total` into integers proportional to `weights`, by the largest-remainder method."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def calibration_samples(
    cfg: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, name: str = "calibration"
) -> Samples:
    """Samples of all sources, each source packed separately. Errors name the configuration `name`.

    Raises StunError if a source has no text or too little, or the tokenizer belongs to another model.
    """
    counts = _shares([source.weight for source in cfg.sources.values()], cfg.samples)
    parts = []
    for (part, source), count in zip(cfg.sources.items(), counts, strict=True):
        key = f"{name}.mixture.{part}" if cfg.mixture else name
        if not count:
            raise StunError(f"{key}.weight={source.weight}: gets none of {name}.samples={cfg.samples}")
        parts.append(_packed(source, key, count, cfg, tokenizer, vocab_size))
    return Samples(torch.cat(parts), dict(zip(cfg.sources, counts, strict=True)))


def _packed(
    source: SourceConfig, key: str, samples: int, cfg: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> torch.Tensor:
    """[samples, length] token ids: texts in order, each closed by the end-of-text token, packed without padding."""
    rows = load_rows(source.path, f"{key}.path", source.split)
    if source.field not in rows.column_names:
        raise StunError(f"{key}.field={source.field}: {source.path} has the fields {', '.join(rows.column_names)}")
    if cfg.seed is not None:
        rows = rows.shuffle(seed=cfg.seed)
    need = samples * cfg.length
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in _texts(rows, source, key, tokenizer):
        if text.strip():
            ids += token_ids(text, f"{key}.path={source.path}", tokenizer) + end
        if len(ids) >= need:
            break
    if not ids:
        raise StunError(f"{key}.path={source.path}: no text in field {source.field!r}")
    if len(ids) < need:
        name = key.partition(".")[0]
        raise StunError(
            f"{key}.path={source.path}: {len(ids)} tokens, but {samples} samples of {name}.length={cfg.length} "
            f"need {need}; at most {len(ids) // cfg.length} samples of this length"
        )
    check_vocabulary(ids, tokenizer, vocab_size)
    return torch.tensor(ids[:need]).view(samples, cfg.length)
