"""What a checkpoint of any size is worth: exact match, perplexity, and how far it is from the dense one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from stun.checkpoint.reader import Checkpoint
from stun.config import EvaluateConfig, Precision, StunError
from stun.data import load_tokenizer
from stun.evaluation.generate import Decoding, describe, generate
from stun.evaluation.lm_eval import run_harness
from stun.evaluation.memory import generation_room, scoring_batch
from stun.evaluation.perplexity import score
from stun.evaluation.request import Asked, ask, dense_result, finished_result, validate_evaluation
from stun.evaluation.resume import Generated, Partial
from stun.evaluation.task import completion, extract, scores
from stun.files import write_json
from stun.model.architecture import Architecture
from stun.preflight.speeds import read_speed
from stun.run.identity import model_digest
from stun.runtime.ranks import Ranks

_COPIED = ("model", "exact_match", "average", "perplexity", "harness")  # of the dense model's result


def evaluate(cfg: EvaluateConfig, ranks: Ranks) -> dict:
    """The result, written to `cfg.output` as JSON; one that is there already is returned.

    All ranks call this together. Raises StunError before any work starts where the request cannot be met. An evaluation that
    was interrupted goes on where it ended.
    """
    started = time.perf_counter()
    validate_evaluation(cfg)
    arch = Architecture(Checkpoint.open(cfg.model.path), _precision(ranks))
    tokenizer = load_tokenizer(arch.source.folder)
    asked = ranks.on_first(lambda: ask(cfg, arch, tokenizer))
    reference = ranks.on_first(lambda: dense_result(cfg, asked)) if cfg.dense else None
    known = ranks.on_first(lambda: finished_result(cfg.output, asked.request))
    partial = Partial(cfg.output)
    if known:
        ranks.on_first(partial.remove)  # the launch that finished it may have been killed before it did
        ranks.log(f"{cfg.output} is complete already")
        return known
    dense = _dense(cfg.dense, reference, arch, ranks) if reference else None
    ranks.on_first(lambda: partial.open(asked.request))
    result: dict = {"model": cfg.model.path}
    if asked.sequences:
        result |= _scored(arch, dense, asked, cfg.task.batch, partial, ranks)
    if asked.rows:
        result |= _answered(arch, tokenizer, asked, cfg, partial, ranks)
    if reference:
        result["dense"] = {key: reference[key] for key in _COPIED if key in reference}
    if cfg.harness.tasks:
        result["harness"] = run_harness(cfg.model.path, cfg.harness, ranks)
    result |= {"seconds": time.perf_counter() - started, "ranks": ranks.world, "request": asked.request}
    ranks.on_first(lambda: write_json(Path(cfg.output), result))
    ranks.on_first(partial.remove)
    ranks.doing = ""
    return result


def _precision(ranks: Ranks) -> Precision:
    """CPUs evaluate in float32 whatever they could multiply: exact match turns on last bits, and machines are compared by it."""
    return Precision.float32 if ranks.device.type == "cpu" else Precision.auto


def _dense(file: str, reference: dict, arch: Architecture, ranks: Ranks) -> Architecture:
    try:
        dense = Architecture(Checkpoint.open(reference["model"]), _precision(ranks))
    except StunError as error:
        raise StunError(f"dense={file}: its model cannot be read: {error}") from error
    for what, one, other in (
        ("layers", len(dense.layers), len(arch.layers)),
        ("hidden_size", dense.config.hidden_size, arch.config.hidden_size),
        ("vocab_size", dense.config.vocab_size, arch.config.vocab_size),
    ):
        if one != other:
            raise StunError(f"dense={file}: its model {reference['model']} has {what} {one}, {arch.source.folder} {other}")
    if ranks.on_first(lambda: model_digest(dense.source)) != reference["request"]["model"]:
        raise StunError(f"dense={file}: its model {reference['model']} has changed since it was evaluated; evaluate it again")
    return dense


def _scored(arch: Architecture, dense: Architecture | None, asked: Asked, batch: int, partial: Partial, ranks: Ranks) -> dict:
    known = ranks.on_first(lambda: partial.known("scores"))
    if known:
        return known
    lengths = [len(ids) for ids in asked.sequences]
    ranks.doing = "score before the first layer"
    chosen = scoring_batch(arch, 2 if dense else 1, lengths, batch, ranks)

    def run(size: int) -> dict:
        ranks.log(f"score {sum(lengths):,} tokens in {len(lengths)} sequences, {size} at once")
        found = score(arch, dense, asked.sequences, size, ranks, ranks.on_first(lambda: partial.phase("score", size)))
        return found.to_json()

    found = _fitting("score", chosen, batch > 0, run, partial, ranks)
    ranks.on_first(lambda: partial.enter("scores", found))
    return found


def _answered(
    arch: Architecture, tokenizer: PreTrainedTokenizerBase, asked: Asked, cfg: EvaluateConfig, partial: Partial, ranks: Ranks
) -> dict:
    task, config = cfg.task, arch.generation_config(cfg.task.max_new_tokens)
    how = Decoding(config, tokenizer, task.max_new_tokens, list(task.stop))
    lengths = [len(ids) for ids in asked.prompts]
    ranks.doing = "generate before the first token"
    chosen = generation_room(arch, lengths, task.max_new_tokens, task.batch, ranks).batch

    def run(size: int) -> dict[int, list[int]]:
        room = generation_room(arch, lengths, task.max_new_tokens, size, ranks)
        nodes = max(1, ranks.world // ranks.local_world)
        read = ranks.on_first(lambda: read_speed(arch.source)) * nodes if room.step_bytes else 0.0
        ranks.log(f"generate for {len(lengths)} rows: {describe(room, arch, read)}")
        files = Generated(ranks.on_first(lambda: partial.phase("generate", size)), arch.config.vocab_size)
        return generate(arch, asked.prompts, how, room, ranks, files.load, files.save) | {-1: size}

    own = _fitting("generate", chosen, task.batch > 0, run, partial, ranks)
    size = own.pop(-1)
    right = {}
    for number, tokens in own.items():
        said = completion(tokenizer.decode(tokens, skip_special_tokens=True), task)
        right[number] = extract(said, task) == extract(asked.rows[number].answer, task)
    everyone = {number: hit for part in ranks.gather_objects(right) for number, hit in part.items()}
    hits = [everyone[number] for number in range(len(asked.rows))]
    return {"rows": len(hits), **scores(hits, [row.group for row in asked.rows]), "batch": size}


def _fitting(phase: str, chosen: int, is_asked: bool, run: Callable[[int], dict], partial: Partial, ranks: Ranks) -> dict:
    """`run(size)` with the size chosen, or half of it for as long as the GPU's memory is too small."""
    size = ranks.on_first(lambda: partial.batch(phase, chosen, is_asked))
    while True:
        try:
            return run(size)
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise
            size //= 2
            partial.set_batch(phase, size)
            if ranks.world > 1:  # the others wait for this rank, and cannot be called back
                raise StunError(
                    f"out of GPU memory with {2 * size} rows at once; the same command goes on with {size}"
                ) from error
        torch.cuda.empty_cache()
        ranks.log(f"{phase}: out of GPU memory; {size} rows at once")
