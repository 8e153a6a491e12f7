"""Calibration and evaluation samples, read through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stun.config import CalibrationConfig, StunError

_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def load_rows(path: str, key: str, split: str = "train") -> Dataset:
    """The rows of a local file or of a hub dataset. `key` names the config entry in errors. Raises StunError."""
    file = Path(path)
    if file.is_file() and file.suffix not in _LOADERS:
        raise StunError(f"{key}={path}: unknown kind of file; known: {', '.join(_LOADERS)}")
    looks_local = file.suffix in _LOADERS or path.startswith(("/", "."))
    if looks_local and not file.is_file():
        raise StunError(f"{key}={path}: no such file")
    if looks_local and not file.stat().st_size:
        raise StunError(f"{key}={path}: the file is empty")
    try:
        if looks_local:
            return load_dataset(_LOADERS[file.suffix], data_files=str(file), split="train")
        return load_dataset(path, split=split)
    except Exception as error:  # datasets raises many kinds, all of them about this path
        raise StunError(f"{key}={path}: datasets cannot load it: {error}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer; code in the checkpoint is not run."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise StunError(f"{folder}: its tokenizer cannot be loaded: {error}") from error


def _texts(rows: Dataset, cfg: CalibrationConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for number, content in enumerate(rows[cfg.field]):
        if isinstance(content, list):
            content = tokenizer.apply_chat_template(content, tokenize=False)
        if not isinstance(content, str):
            kind = type(content).__name__
            raise StunError(f"{cfg.path}: row {number}: field {cfg.field!r} is {kind}; a text or chat messages are needed")
        yield content


def calibration_tokens(cfg: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """[samples, length] token ids: texts in file order, each closed by the end-of-text token, packed without padding.

    Raises StunError if the text is empty or too short, or the tokenizer does not belong to the model.
    """
    rows = load_rows(cfg.path, "calibration.path", cfg.split)
    if cfg.field not in rows.column_names:
        raise StunError(f"calibration.field={cfg.field}: {cfg.path} has the fields {', '.join(rows.column_names)}")
    need = cfg.samples * cfg.length
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in _texts(rows, cfg, tokenizer):
        if text.strip():
            ids += tokenizer(text)["input_ids"] + end
        if len(ids) >= need:
            break
    if not ids:
        raise StunError(f"calibration.path={cfg.path}: no text in field {cfg.field!r}")
    if len(ids) < need:
        raise StunError(
            f"calibration.path={cfg.path}: {len(ids)} tokens, but calibration.samples={cfg.samples} of length {cfg.length} need "
            f"{need}; at most {len(ids) // cfg.length} samples of this length"
        )
    if max(ids) >= vocab_size:
        raise StunError(f"the tokenizer yields id {max(ids)}, the model's vocabulary has {vocab_size}")
    return torch.tensor(ids[:need]).view(cfg.samples, cfg.length)
