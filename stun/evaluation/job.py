"""The evaluation job: exact match, perplexity and distance from the dense model, for a checkpoint of any size."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from stun.checkpoint import hub
from stun.checkpoint.reader import Checkpoint
from stun.config import ModelConfig, Precision, StunError
from stun.data.tokenizer import check_size, load_tokenizer
from stun.evaluation.batches import micro_batches
from stun.evaluation.config import EvaluateConfig
from stun.evaluation.generate import Decoding, describe, generate
from stun.evaluation.lm_eval import run_harness
from stun.evaluation.memory import generation_capacity, scoring_batch
from stun.evaluation.perplexity import score
from stun.evaluation.request import ANSWERS, Inputs, check_same, earlier_result, read_inputs, scores_kind, validate_evaluation
from stun.evaluation.resume import Generated, Partial
from stun.evaluation.task import completion, extract, scores
from stun.files import write_json
from stun.model.architecture import Architecture
from stun.model.precision import compute_dtype
from stun.run.identity import hardware, model_digest, plain
from stun.runtime.gpus import is_out_of_gpu_memory
from stun.runtime.ranks import Ranks
from stun.runtime.units import count
from stun.stream.self_check import check_unknown
from stun.tracking.tracker import check_tracking, tracked

_COPIED = ("model", "exact_match", "average", "perplexity", "harness")  # from the dense model's result


def evaluate(cfg: EvaluateConfig, ranks: Ranks) -> dict:
    """Evaluation result, written to `cfg.output` as JSON. A finished result in that file is returned as it is.

    All ranks call this together. An interrupted evaluation is resumed, and a result made without the dense model is completed.
    Raises StunError, before any work starts, if the request is not valid.
    """
    started = time.perf_counter()
    validate_evaluation(cfg)
    cfg = hub.fetched(cfg, ranks)
    arch, tokenizer, inputs = _opened(cfg, ranks)
    reference = inputs.dense
    earlier = ranks.on_first(lambda: earlier_result(cfg.output, inputs.request)) or {}
    partial = Partial(cfg.output)
    if earlier.get("request") == inputs.request:
        ranks.on_first(partial.remove)  # the launch that finished it may have been killed before it did
        ranks.log(f"{cfg.output} is complete already")
        return earlier
    dense = _dense(cfg.dense, reference, arch, ranks) if reference else None
    machine = hardware(ranks, compute_dtype(arch, ranks.device))
    ranks.on_first(lambda: partial.open(inputs.request, machine))
    result: dict = {"model": cfg.model.path}
    if inputs.sequences:
        result |= _scored(arch, dense, inputs, cfg.task.batch, partial, ranks)
    if inputs.rows:
        known = {key: earlier[key] for key in (*ANSWERS, "batch") if key in earlier}
        result |= known or _answered(arch, tokenizer, inputs, cfg, partial, ranks)
    if reference:
        result["dense"] = {key: reference[key] for key in _COPIED if key in reference}
    if cfg.harness.tasks:
        result["harness"] = earlier.get("harness") or run_harness(arch.source.folder, cfg.harness, ranks)
    result |= {"seconds": time.perf_counter() - started, "ranks": ranks.world, "request": inputs.request}
    ranks.on_first(lambda: write_json(Path(cfg.output), result))
    ranks.on_first(partial.remove)
    ranks.doing = ""
    return result


def evaluate_tracked(cfg: EvaluateConfig, ranks: Ranks) -> dict:
    """The same, in the trackers of the folder of `cfg.output` too."""
    ranks.on_first(lambda: check_tracking(cfg.tracking))
    with tracked(cfg.tracking, Path(cfg.output).parent, {"evaluate": plain(cfg)}, ranks) as tracking:
        result = evaluate(cfg, ranks)
        tracking.summary = {"evaluate": {name: value for name, value in result.items() if not isinstance(value, list)}}
    return result


def check(cfg: EvaluateConfig, ranks: Ranks, others: str = "") -> None:
    """Raise the StunError of `evaluate`, if any, except those about the dense model; also if the file `others` has the result of
    another task. All ranks call this together."""
    validate_evaluation(cfg)
    inputs = _opened(hub.fetched(cfg, ranks), ranks)[-1]

    def place() -> None:
        if (earlier_result(cfg.output, inputs.request) or {}).get("request") != inputs.request:
            Partial(cfg.output).check(inputs.request)
        if others:
            check_same(others, inputs.request)

    ranks.on_first(place)


def _opened(cfg: EvaluateConfig, ranks: Ranks) -> tuple[Architecture, PreTrainedTokenizerBase, Inputs]:
    arch = architecture(cfg.model, ranks)
    check_unknown(arch, ranks)
    tokenizer = load_tokenizer(arch.source.folder)
    check_size(tokenizer, arch.config.vocab_size)
    inputs = ranks.on_first(lambda: read_inputs(cfg, arch, tokenizer))
    for note in inputs.notes:
        ranks.log(note)
    return arch, tokenizer, inputs


def architecture(cfg: ModelConfig, ranks: Ranks) -> Architecture:
    """Model in float32 on every CPU: completions depend on last bits, and those of different CPUs are compared."""
    precision = Precision.float32 if ranks.device.type == "cpu" else Precision.auto
    return Architecture(Checkpoint.open(hub.folder(cfg.path)), precision)


def _dense(file: str, reference: dict, arch: Architecture, ranks: Ranks) -> Architecture:
    try:
        dense = architecture(hub.fetched(EvaluateConfig(ModelConfig(reference["model"])), ranks).model, ranks)
    except StunError as error:
        raise StunError(f"dense={file}: its model cannot be read: {error}") from error
    for name, theirs, ours in (
        ("layers", len(dense.layers), len(arch.layers)),
        ("hidden_size", dense.config.hidden_size, arch.config.hidden_size),
        ("vocab_size", dense.config.vocab_size, arch.config.vocab_size),
    ):
        if theirs != ours:
            raise StunError(f"dense={file}: its model {reference['model']} has {name} {theirs}, {arch.source.folder} {ours}")
    if ranks.on_first(lambda: model_digest(dense.source)) != reference["request"]["model"]:
        raise StunError(f"dense={file}: its model {reference['model']} has changed since it was evaluated; evaluate it again")
    return dense


def _scored(arch: Architecture, dense: Architecture | None, inputs: Inputs, batch: int, partial: Partial, ranks: Ranks) -> dict:
    lengths = [len(ids) for ids in inputs.sequences]
    kind = scores_kind(sum(lengths) - len(lengths), len(arch.layers) if dense else 0)
    finished = ranks.on_first(lambda: partial.load("scores", kind))
    if finished:
        return finished
    ranks.doing = "score before the first layer"
    chosen = scoring_batch(arch, 2 if dense else 1, lengths, batch, ranks)

    def run(size: int) -> dict:
        ranks.log(f"score {count(sum(lengths), 'token')} in {count(len(lengths), 'sequence')}, {size} at once")
        return score(arch, dense, inputs.sequences, size, ranks, ranks.on_first(lambda: partial.phase("score", size)))

    entries = _fitting("score", chosen, batch > 0, run, partial, ranks)
    ranks.on_first(lambda: partial.save("scores", entries))
    return entries


def _answered(
    arch: Architecture, tokenizer: PreTrainedTokenizerBase, inputs: Inputs, cfg: EvaluateConfig, partial: Partial, ranks: Ranks
) -> dict:
    task, config = cfg.task, arch.generation_config(cfg.task.max_new_tokens)
    decoding = Decoding(config, tokenizer, task.max_new_tokens, list(task.stop))
    lengths = [len(ids) for ids in inputs.prompts]
    ranks.doing = "generate before the first token"
    chosen = generation_capacity(arch, lengths, task.max_new_tokens, task.batch, ranks).batch

    def run(size: int) -> dict:
        capacity = generation_capacity(arch, lengths, task.max_new_tokens, size, ranks)
        ranks.log(f"generate for {count(len(lengths), 'row')}: {describe(capacity, arch, ranks)}")
        rows = [len(batch.rows) for batch in micro_batches(lengths, size)]
        files = Generated(ranks.on_first(lambda: partial.phase("generate", size)), rows, arch.config.vocab_size, decoding.is_done)
        return {"tokens": generate(arch, inputs.prompts, decoding, capacity, ranks, files.load, files.save), "batch": size}

    result, right = _fitting("generate", chosen, task.batch > 0, run, partial, ranks), {}
    for number, tokens in result["tokens"].items():
        text = completion(tokenizer.decode(tokens, skip_special_tokens=True), task)
        right[number] = extract(text, task) == extract(inputs.rows[number].answer, task)
    hit_by_row = {number: hit for part in ranks.gather_objects(right) for number, hit in part.items()}
    hits = [hit_by_row[number] for number in range(len(inputs.rows))]
    return {"rows": len(hits), **scores(hits, [row.group for row in inputs.rows]), "batch": result["batch"]}


def _fitting(phase: str, chosen: int, is_asked: bool, run: Callable[[int], dict], partial: Partial, ranks: Ranks) -> dict:
    """`run(size)` with the chosen size, halved as long as the GPU runs out of memory."""
    size = ranks.on_first(lambda: partial.batch(phase, chosen, is_asked))
    while True:
        try:
            return run(size)
        except RuntimeError as error:
            if size == 1 or not is_out_of_gpu_memory(error):
                raise
            size //= 2
            partial.set_batch(phase, size)
            # The remaining ranks wait in a collective and cannot be told to start again.
            if ranks.world > 1:
                raise StunError(
                    f"out of GPU memory with {count(2 * size, 'row')} at once; the same command goes on with {size}"
                ) from error
        torch.cuda.empty_cache()
        ranks.log(f"{phase}: out of GPU memory; {count(size, 'row')} at once")
