"""Inputs of an evaluation (rows, prompts, sequences), and the request that identifies its result."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from stun.config import StunError
from stun.data.samples import calibration_samples
from stun.evaluation.config import EvaluateConfig
from stun.evaluation.lm_eval import validate_harness
from stun.evaluation.task import Row, encoded, task_rows, validate_task, with_answer
from stun.files import load_json
from stun.model.architecture import Architecture
from stun.run.identity import differences, model_digest
from stun.schema import FLAG, NUMBER, POSITIVE, SHARE, SIZE, TEXT, Leaf, list_of, load_record, misfit

_MEASURED = {
    "model?": TEXT,
    "perplexity?": NUMBER,
    "tokens?": POSITIVE,
    "agreement?": {"kl": NUMBER, "top1": SHARE},
    "layer_error?": [NUMBER],
    "rows?": POSITIVE,
    "exact_match?": {TEXT: SHARE},
    "average?": SHARE,
    "right?": [FLAG],
    "groups?": [TEXT],
    "batch?": POSITIVE,
    "harness?": {TEXT: {TEXT: NUMBER}},
    "seconds?": SIZE,
    "ranks?": POSITIVE,
    "request?": {},
}
EVALUATION = {**_MEASURED, "dense?": _MEASURED}  # kind of an evaluation's result; reports read results with less in them
_SCORES, _AGREEMENT = ("perplexity", "tokens"), ("agreement", "layer_error")  # of a text; beside the dense model
ANSWERS = ("rows", "exact_match", "average", "right", "groups")  # what completions give
SAME = ("task", "rows", "sequences")  # keys of the request that must be equal for two results to be compared


@dataclass(frozen=True)
class Inputs:
    """Rows of the task, their prompts and the sequences to score as token ids, and the dense model's result, if there is one;
    `request` identifies these and the model. `notes` are lines for the log."""

    rows: list[Row]
    prompts: list[list[int]]
    sequences: list[list[int]]
    dense: dict | None
    request: dict
    notes: list[str]


def validate_evaluation(cfg: EvaluateConfig) -> None:
    """Check the settings that do not depend on the model. Raises StunError."""
    if not (cfg.task.path or cfg.text.path or cfg.text.mixture or cfg.harness.tasks):
        raise StunError("nothing to evaluate: give task.path, text.path or harness.tasks")
    if cfg.dense and not (cfg.task.path or cfg.text.path or cfg.text.mixture):
        raise StunError(f"dense={cfg.dense}: nothing to compare the two on: give task.path or text.path")
    if cfg.dense and Path(cfg.dense).resolve() == Path(cfg.output).resolve():
        raise StunError(f"dense={cfg.dense}: is the output itself; give the dense model's result")
    validate_task(cfg.task)
    validate_harness(cfg.harness)
    for key, least in (("samples", 1), ("length", 2)):
        if getattr(cfg.text, key) < least:
            raise StunError(f"text.{key}={getattr(cfg.text, key)}: {least} or more")


def read_inputs(cfg: EvaluateConfig, arch: Architecture, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    """Rows, prompts and sequences of an evaluation. Raises StunError if they cannot be used."""
    vocab, rows, prompts, sequences, notes = arch.config.vocab_size, [], [], [], []
    if cfg.task.path:
        if special := [token for token in tokenizer.all_special_tokens if token in cfg.task.marker]:
            raise StunError(f"task.marker={cfg.task.marker}: completions are read without special tokens such as {special[0]}")
        rows, key = task_rows(cfg.task), f"task.path={cfg.task.path}"
        prompts = encoded([row.prompt for row in rows], tokenizer, vocab, key)
        sequences = encoded([with_answer(row) for row in rows], tokenizer, vocab, key)
    if cfg.text.path or cfg.text.mixture:
        samples = calibration_samples(cfg.text, tokenizer, vocab, "text")
        sequences, notes = samples.tokens_ST.tolist(), samples.notes
    if sequences and max(map(len, sequences)) < 2:
        raise StunError(
            f"task.path={cfg.task.path}: every question with its answer is a single token; there is nothing to predict"
        )
    dense = _dense_result(cfg.dense) if cfg.dense else None
    task = {key: value for key, value in asdict(cfg.task).items() if key not in ("path", "batch")} if rows else None
    digest = lambda value: hashlib.sha256(json.dumps(value).encode()).hexdigest() if value else None  # noqa: E731
    request = {
        "model": model_digest(arch.source),
        "task": task,
        "rows": digest([[ids, row.answer, row.group] for ids, row in zip(prompts, rows, strict=True)]),
        "sequences": digest(sequences),
        "dense": dense["request"]["model"] if dense else None,
        "harness": asdict(cfg.harness) if cfg.harness.tasks else None,
    }
    if changes := _asked_otherwise(dense["request"], request) if dense else []:
        raise StunError(f"dense={cfg.dense}: was made with another task or text ({'; '.join(changes)})")
    return Inputs(rows, prompts, sequences, dense, request, notes)


def _dense_result(file: str) -> dict:
    """Result of the dense model's evaluation. Raises StunError if the file is not the output of an evaluation."""
    result = load_record(Path(file), EVALUATION, f"dense={file}: is not the output of an evaluation")
    if misfit(result, {"model": TEXT, "request": {"model": TEXT}, "perplexity": NUMBER}):
        raise StunError(f"dense={file}: is not the output of an evaluation")
    return result


def scores_kind(tokens: int, layers: int) -> dict:
    """Kind of the scores of a text with so many predicted tokens, by a model of so many layers if the dense one is beside it."""
    scores = {"perplexity": NUMBER, "tokens": Leaf(f"{tokens}, those of the text", lambda value: value == tokens)}
    return scores | ({"agreement": _MEASURED["agreement?"], "layer_error": list_of(NUMBER, layers)} if layers else {})


def kinds_of(request: dict) -> dict:
    """Kinds of the fields that the result of a request has."""
    is_scored, is_asked, has_dense = (bool(request.get(key)) for key in ("sequences", "rows", "dense"))
    names = [*(_SCORES if is_scored else ()), *(_AGREEMENT if has_dense else ()), *(ANSWERS if is_asked else ())]
    names += ["model", "seconds", *(["harness"] if request.get("harness") else []), *(["dense"] if has_dense else [])]
    return {name: EVALUATION[f"{name}?"] for name in names}


def earlier_result(output: str, request: dict) -> dict | None:
    """Result in the output file, of this request or of the same one without a dense model; None if there is none. Raises
    StunError if it belongs to another request, or is not as an evaluation writes it."""
    file, advice = Path(output), "choose another file"
    if file.is_dir():
        raise StunError(f"output={output}: is a folder; a file is needed")
    if not os.path.lexists(file):
        return None
    result = load_json(file)
    old_request = result.get("request")
    is_known = isinstance(old_request, dict)
    lacks_dense = is_known and old_request.get("dense") is None
    wanted = request | ({"dense": None} if lacks_dense else {})
    changes = differences(old_request, wanted) if is_known else ["it is no evaluation's"]
    if changes:
        raise StunError(f"output={output}: holds another result ({'; '.join(changes)}); {advice}")
    _check_result(result, old_request, f"output={output}")
    return result


def _asked_otherwise(old: dict, new: dict) -> list[str]:
    """Differences of two requests in what is asked, in words."""
    return differences(*({key: side.get(key) for key in SAME} for side in (old, new)))


def check_same(output: str, request: dict) -> None:
    """Raise StunError if the output file has the result of another task or text, by whatever model."""
    if os.path.lexists(output):
        theirs = load_json(Path(output)).get("request")
        if changes := _asked_otherwise(theirs if isinstance(theirs, dict) else {}, request):
            raise StunError(f"output={output}: holds another result ({'; '.join(changes)}); choose another file")


def _check_result(result: dict, request: dict, where: str) -> None:
    """Raises StunError if a result is not one of its request."""
    reason = misfit(result, {**EVALUATION, **kinds_of(request)})
    if not reason and request.get("rows") and not len(result["right"]) == len(result["groups"]) == result["rows"]:
        reason = f"right and groups: must have an entry for each of {result['rows']} rows"
    if reason:
        raise StunError(f"{where}: is not as an evaluation writes it: {reason}; remove it to evaluate again")
