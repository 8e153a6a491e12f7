"""What is asked of an evaluation: rows, texts, and what tells one request from another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from stun.config import EvaluateConfig, StunError
from stun.data import calibration_samples
from stun.evaluation.lm_eval import validate_harness
from stun.evaluation.task import Row, encoded, task_rows, validate_task, with_answer
from stun.files import load_json
from stun.model.architecture import Architecture
from stun.run.identity import differences, model_digest

SAME = ("task", "rows", "sequences")  # of the request: what two results must have in common to be compared


@dataclass(frozen=True)
class Asked:
    """The rows of the task and their prompts in token ids; the sequences to score; what identifies all of it, with the model."""

    rows: list[Row]
    prompts: list[list[int]]
    sequences: list[list[int]]
    request: dict


def validate_evaluation(cfg: EvaluateConfig) -> None:
    """Refuse what no model could be asked. Raises StunError."""
    if not (cfg.task.path or cfg.text.path or cfg.text.mixture or cfg.harness.tasks):
        raise StunError("nothing to evaluate: give task.path, text.path or harness.tasks")
    if cfg.dense and not (cfg.task.path or cfg.text.path or cfg.text.mixture):
        raise StunError(f"dense={cfg.dense}: nothing to compare the two on: give task.path or text.path")
    validate_task(cfg.task)
    validate_harness(cfg.harness)
    for key in ("samples", "length"):
        if getattr(cfg.text, key) < (2 if key == "length" else 1):
            raise StunError(f"text.{key}={getattr(cfg.text, key)}: {2 if key == 'length' else 1} or more")


def ask(cfg: EvaluateConfig, arch: Architecture, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """Everything that is to be read, read. Raises StunError where it cannot be used."""
    vocab, rows, prompts, sequences = arch.config.vocab_size, [], [], []
    if cfg.task.path:
        rows, key = task_rows(cfg.task), f"task.path={cfg.task.path}"
        prompts = encoded([row.prompt for row in rows], tokenizer, vocab, key)
        sequences = encoded([with_answer(row) for row in rows], tokenizer, vocab, key)
    if cfg.text.path or cfg.text.mixture:
        sequences = calibration_samples(cfg.text, tokenizer, vocab, "text").tokens_ST.tolist()
    if sequences and max(map(len, sequences)) < 2:
        raise StunError(
            f"task.path={cfg.task.path}: every question with its answer is a single token; there is nothing to predict"
        )
    task = {key: value for key, value in asdict(cfg.task).items() if key not in ("path", "batch")} if rows else None
    digest = lambda value: hashlib.sha256(json.dumps(value).encode()).hexdigest() if value else None  # noqa: E731
    request = {
        "model": model_digest(arch.source),
        "task": task,
        "rows": digest([[ids, row.answer, row.group] for ids, row in zip(prompts, rows, strict=True)]),
        "sequences": digest(sequences),
        "dense": _request(cfg.dense)["model"] if cfg.dense else None,
        "harness": asdict(cfg.harness) if cfg.harness.tasks else None,
    }
    return Asked(rows, prompts, sequences, request)


def _request(file: str) -> dict:
    """What the dense model's evaluation was asked. Raises StunError where the file is no evaluation's."""
    found = load_json(Path(file)).get("request")
    if not isinstance(found, dict) or not isinstance(found.get("model"), str):
        raise StunError(f"dense={file}: is not the output of an evaluation")
    return found


def dense_result(cfg: EvaluateConfig, asked: Asked) -> dict:
    """The dense model's result. Raises StunError where it is none, or of other questions."""
    found, theirs = load_json(Path(cfg.dense)), _request(cfg.dense)
    if not isinstance(found.get("model"), str) or "perplexity" not in found:
        raise StunError(f"dense={cfg.dense}: is not the output of an evaluation")
    unlike = differences(*({key: side.get(key) for key in SAME} for side in (theirs, asked.request)))
    if unlike:
        raise StunError(f"dense={cfg.dense}: was made with another task or text ({'; '.join(unlike)})")
    return found


def finished_result(output: str, request: dict) -> dict | None:
    """The result that is there. Raises StunError where it is another request's."""
    file = Path(output)
    if file.is_dir():
        raise StunError(f"output={output}: is a folder; a file is needed")
    if not file.exists():
        return None
    found = load_json(file)
    theirs = found.get("request")
    unlike = differences(theirs, request) if isinstance(theirs, dict) else ["it is no evaluation's"]
    if unlike:
        raise StunError(f"output={output}: holds another result ({'; '.join(unlike)}); choose another file")
    return found
