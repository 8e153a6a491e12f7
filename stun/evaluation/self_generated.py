"""Calibration text that the model itself writes (self-calibration, arXiv 2410.17170), so that no text has to be like all that the
model is for."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from stun.checkpoint import hub
from stun.config import StunError
from stun.data.tokenizer import check_size, check_vocabulary, load_tokenizer, token_ids
from stun.evaluation.batches import micro_batches
from stun.evaluation.config import GenerateConfig
from stun.evaluation.generate import Decoding, describe, generate
from stun.evaluation.job import architecture
from stun.evaluation.memory import Capacity, generation_capacity
from stun.evaluation.resume import Generated, Partial
from stun.files import is_count, parse_json, write_atomically
from stun.model.architecture import Architecture
from stun.model.precision import compute_dtype
from stun.run.identity import hardware, model_digest
from stun.runtime.ranks import Ranks
from stun.runtime.units import count, duration
from stun.stream.self_check import check_unknown


def generate_text(cfg: GenerateConfig, ranks: Ranks) -> None:
    """Write `cfg.output`: texts that are sampled from the model, at temperature 1.

    All ranks call this together. An interrupted call is resumed, a finished one does nothing. Raises StunError, before any work
    starts, if the request is not valid.
    """
    started = time.perf_counter()
    _validate(cfg)
    cfg = hub.fetched(cfg, ranks)
    arch = architecture(cfg.model, ranks)
    check_unknown(arch, ranks)
    tokenizer = load_tokenizer(arch.source.folder)
    check_size(tokenizer, arch.config.vocab_size)
    prompt = _start(cfg, tokenizer, arch.config.vocab_size)
    request = ranks.on_first(lambda: _request(cfg, arch, prompt))
    partial = Partial(cfg.output)
    if ranks.on_first(lambda: _is_written(cfg.output, request)):
        ranks.on_first(partial.remove)  # the launch that finished it may have been killed before it did
        ranks.log(f"{cfg.output} is complete already")
        return
    capacity = _capacity(cfg, arch, len(prompt), ranks)
    machine = hardware(ranks, compute_dtype(arch, ranks.device))
    ranks.on_first(lambda: partial.open(request, machine))
    ranks.doing = "generate before the first token"
    folder = ranks.on_first(lambda: partial.phase("generate", cfg.batch))
    texts = _texts(cfg, arch, tokenizer, prompt, capacity, folder, ranks)
    ranks.on_first(lambda: _write(Path(cfg.output), texts, request))
    ranks.on_first(partial.remove)
    ranks.doing = ""
    ranks.log(f"wrote {cfg.output} | {count(len(texts), 'text')} | {duration(time.perf_counter() - started)}")


def _validate(cfg: GenerateConfig) -> None:
    for key, least in (("texts", 1), ("tokens", 2), ("seed", 0), ("batch", 1)):
        if getattr(cfg, key) < least:
            raise StunError(f"{key}={getattr(cfg, key)}: {least} or more")
    if not is_count(cfg.seed):
        raise StunError(f"seed={cfg.seed}: a number below 2^63 is needed")
    if not cfg.output.endswith(".jsonl"):
        raise StunError(f"output={cfg.output}: a name that ends in .jsonl is needed")


def _start(cfg: GenerateConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Token ids that every text goes on from: of `start`, or those between two texts of a calibration sample."""
    end, ids = tokenizer.eos_token_id, token_ids(cfg.start, "start", tokenizer)
    if end is not None and ids[-1:] == [end] and not cfg.start.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # the tokenizer ends every text so
    if not cfg.start and end is not None:
        ids = [end, *ids]
    if not ids:
        lack = "makes no token of it" if cfg.start else "has no end-of-text token"
        raise StunError(f"start={cfg.start}: the tokenizer of {tokenizer.name_or_path} {lack}; give a text to go on from")
    check_vocabulary(ids, tokenizer, vocab_size)
    return ids


def _request(cfg: GenerateConfig, arch: Architecture, prompt: list[int]) -> dict:
    own = {name: getattr(cfg, name) for name in ("texts", "tokens", "seed", "batch")}
    return {"model": model_digest(arch.source), "start": cfg.start, "prompt": prompt, **own}


def _digest(request: dict) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()


def _is_written(output: str, request: dict) -> bool:
    """Whether the file has the texts of this request, as its first row says. Raises StunError if it has anything else."""
    file = Path(output)
    if not os.path.lexists(file):
        return False
    advice = "was not written by this command; choose another file"
    if not file.is_file():
        raise StunError(f"output={output}: {advice}")
    with file.open("rb") as lines:
        first = parse_json(lines.readline(), f"output={output}: {advice}: line 1")
    if not isinstance(first, dict) or first.get("request") != _digest(request):
        raise StunError(f"output={output}: {advice}")
    return True


def _capacity(cfg: GenerateConfig, arch: Architecture, start: int, ranks: Ranks) -> Capacity:
    """Sizes of the generation after `start` tokens. Raises StunError if `batch` texts do not fit into memory."""
    capacity = generation_capacity(arch, [start] * cfg.texts, cfg.tokens, cfg.batch, ranks)
    if min(cfg.batch, cfg.texts) > capacity.most:
        fit = f"at most {count(capacity.most, 'text')} of {count(cfg.tokens, 'token')} fit at once"
        raise StunError(f"out of memory: batch={cfg.batch}: {fit}; a smaller batch or more ranks need less")
    return capacity


def _texts(
    cfg: GenerateConfig,
    arch: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    capacity: Capacity,
    folder: Path,
    ranks: Ranks,
) -> list[str]:
    """Texts in the order of their draws, on every rank; `folder` keeps their tokens. Seven parameters: what `generate_text` has
    made of the request."""
    draws_RT = torch.rand(cfg.texts, cfg.tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(cfg.seed))
    # Neither the checkpoint's penalties nor its end tokens: as in a sample, one text follows the other.
    decoding = Decoding(GenerationConfig(max_new_tokens=cfg.tokens), tokenizer, cfg.tokens, [], draws_RT)
    ranks.log(f"generate {count(cfg.texts, 'text')} of {count(cfg.tokens, 'token')}: {describe(capacity, arch, ranks)}")
    rows = [len(batch.rows) for batch in micro_batches([len(prompt)] * cfg.texts, cfg.batch)]
    files = Generated(folder, rows, arch.config.vocab_size, decoding.is_done)
    own = generate(arch, [prompt] * cfg.texts, decoding, capacity, ranks, files.load, files.save)
    tokens = {row: ids for part in ranks.gather_objects(own) for row, ids in part.items()}
    return [_text(cfg.start, prompt, tokens[row], tokenizer) for row in range(cfg.texts)]


def _text(start: str, prompt: list[int], tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of tokens after those of `start`, without the last character if it lacks some of its bytes."""
    text = tokenizer.decode(tokens)
    if start:  # some tokenizers drop the space before the first word that they decode
        before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + tokens)
        text = whole.removeprefix(before) if whole.startswith(before) else text
    return start + text.rstrip("\ufffd")


def _write(file: Path, texts: list[str], request: dict) -> None:
    lines = [json.dumps({"text": text, "request": _digest(request)}, ensure_ascii=False) + "\n" for text in texts]
    write_atomically(file, lambda path: path.write_text("".join(lines), encoding="utf-8"))
