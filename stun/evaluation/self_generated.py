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
from stun.checkpoint.reader import Checkpoint
from stun.config import StunError
from stun.data.tokenizer import check_size, check_vocabulary, load_tokenizer, token_ids
from stun.evaluation.batches import micro_batches
from stun.evaluation.config import GenerateConfig
from stun.evaluation.generate import Decoding, describe, generate
from stun.evaluation.memory import generation_capacity
from stun.evaluation.resume import Generated, Partial
from stun.files import parse_json, write_atomically
from stun.model.architecture import Architecture
from stun.model.precision import compute_dtype
from stun.preflight.hardware import read_speed
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
    arch = Architecture(Checkpoint.open(hub.folder(cfg.model.path)))
    check_unknown(arch, ranks)
    tokenizer = load_tokenizer(arch.source.folder)
    check_size(tokenizer, arch.config.vocab_size)
    prompt = _start(cfg, tokenizer, arch.config.vocab_size)
    request = ranks.on_first(lambda: _request(cfg, arch, prompt))
    if ranks.on_first(lambda: _is_written(cfg.output, request)):
        ranks.log(f"{cfg.output} is complete already")
        return
    partial, machine = Partial(cfg.output), hardware(ranks, compute_dtype(arch, ranks.device))
    ranks.on_first(lambda: partial.open(request, machine))
    texts = _texts(cfg, arch, tokenizer, prompt, partial, ranks)
    ranks.on_first(lambda: _write(Path(cfg.output), texts, request))
    ranks.on_first(partial.remove)
    ranks.doing = ""
    ranks.log(f"wrote {cfg.output} | {count(len(texts), 'text')} | {duration(time.perf_counter() - started)}")


def _validate(cfg: GenerateConfig) -> None:
    for key, least in (("texts", 1), ("tokens", 2), ("seed", 0), ("batch", 1)):
        if getattr(cfg, key) < least:
            raise StunError(f"{key}={getattr(cfg, key)}: {least} or more")
    if not cfg.output.endswith(".jsonl"):
        raise StunError(f"output={cfg.output}: a name that ends in .jsonl is needed")


def _start(cfg: GenerateConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Token ids that every text goes on from: of `start`, or those between two texts of a calibration sample."""
    end = tokenizer.eos_token_id
    first = [token for token in token_ids(cfg.start, "start", tokenizer) if token != end]
    ids = first if cfg.start or end is None else [end, *first]
    if not ids:
        raise StunError(f"start: the tokenizer of {tokenizer.name_or_path} has no end-of-text token; give a text to go on from")
    check_vocabulary(ids, tokenizer, vocab_size)
    return ids


def _request(cfg: GenerateConfig, arch: Architecture, prompt: list[int]) -> dict:
    own = {name: getattr(cfg, name) for name in ("texts", "tokens", "seed", "batch")}
    return {"model": model_digest(arch.source), "start": prompt, **own}


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


def _texts(
    cfg: GenerateConfig, arch: Architecture, tokenizer: PreTrainedTokenizerBase, prompt: list[int], partial: Partial, ranks: Ranks
) -> list[str]:
    """Texts in the order of their draws, on every rank."""
    draws_RT = torch.rand(cfg.texts, cfg.tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(cfg.seed))
    # Neither the checkpoint's penalties nor its end tokens: as in a sample, one text follows the other.
    decoding = Decoding(GenerationConfig(max_new_tokens=cfg.tokens), tokenizer, cfg.tokens, [], draws_RT)
    lengths = [len(prompt)] * cfg.texts
    ranks.doing = "generate before the first token"
    capacity = generation_capacity(arch, lengths, cfg.tokens, cfg.batch, ranks)
    nodes = max(1, ranks.world // ranks.local_world)
    read = ranks.on_first(lambda: read_speed(arch.source)) * nodes if capacity.step_bytes else 0.0
    ranks.log(f"generate {count(cfg.texts, 'text')} of {count(cfg.tokens, 'token')}: {describe(capacity, arch, read)}")
    rows = [len(batch.rows) for batch in micro_batches(lengths, cfg.batch)]
    folder = ranks.on_first(lambda: partial.phase("generate", cfg.batch))
    files = Generated(folder, rows, arch.config.vocab_size, decoding.is_done)
    own = generate(arch, [prompt] * cfg.texts, decoding, capacity, ranks, files.load, files.save)
    tokens = {row: ids for part in ranks.gather_objects(own) for row, ids in part.items()}
    # The last character of a text may lack some of its bytes.
    return [cfg.start + tokenizer.decode(tokens[row]).rstrip("\ufffd") for row in range(cfg.texts)]


def _write(file: Path, texts: list[str], request: dict) -> None:
    lines = [json.dumps({"text": text, "request": _digest(request)}, ensure_ascii=False) + "\n" for text in texts]
    write_atomically(file, lambda path: path.write_text("".join(lines), encoding="utf-8"))
