"""Tasks of the lm-evaluation-harness, for models that fit into the first rank's memory: pip install 'stun-moe[eval]'."""

from __future__ import annotations

import functools
import importlib.util
import logging
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from stun.checkpoint.reader import Checkpoint
from stun.config import HarnessConfig, StunError
from stun.data import load_tokenizer
from stun.runtime.ranks import Ranks

_SECONDS = 30.0  # between two signs of life to the ranks that wait


def validate_harness(cfg: HarnessConfig) -> None:
    """Refuse tasks that cannot be run. Raises StunError."""
    if cfg.tasks and importlib.util.find_spec("lm_eval") is None:
        raise StunError(f"harness.tasks={list(cfg.tasks)}: needs the lm-evaluation-harness: pip install 'stun-moe[eval]'")
    if cfg.include_path and not Path(cfg.include_path).is_dir():
        raise StunError(f"harness.include_path={cfg.include_path}: no such folder")
    if cfg.tasks:
        known = _tasks(tuple(cfg.tasks), cfg.include_path)
        unknown = [task for task in cfg.tasks if not known.match_tasks([task])]
        if unknown:
            raise StunError(
                f"harness.tasks={unknown}: not known to the lm-evaluation-harness; lm_eval ls tasks lists those that are"
            )


@functools.cache
def _tasks(tasks: tuple[str, ...], include_path: str):
    """What finds the tasks: in a folder of one's own alone, where that has them all, since the harness's own take seconds."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks):
            return own
    return TaskManager(include_path=include_path or None)


def run_harness(path: str, cfg: HarnessConfig, ranks: Ranks) -> dict[str, dict[str, float]]:
    """Every task's metrics by name. The first rank does the work; the others wait, for however long it takes."""
    ranks.doing = "harness"
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(_run, path, cfg, ranks.device) if ranks.is_first else None
        while ranks.broadcast_object(future is None or not wait([future], _SECONDS).done):
            pass
        return ranks.on_first(lambda: future.result())


def _run(path: str, cfg: HarnessConfig, device: torch.device) -> dict[str, dict[str, float]]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    dtype = torch.float32 if device.type == "cpu" else "auto"
    Checkpoint.open(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, dtype=dtype, trust_remote_code=False)
        model = model.to(device).eval()
    except (OSError, ValueError) as error:
        raise StunError(f"{path}: cannot be loaded as a whole: {error}") from error
    size = "auto" if device.type == "cuda" else 32
    wrapped = HFLM(pretrained=model, tokenizer=load_tokenizer(Path(path)), batch_size=size)
    try:
        found = lm_eval.simple_evaluate(
            wrapped, tasks=list(cfg.tasks), task_manager=_tasks(tuple(cfg.tasks), cfg.include_path), log_samples=False
        )
    except Exception as error:  # the harness and its tasks raise many kinds, all of them about these tasks
        raise StunError(f"harness.tasks={list(cfg.tasks)}: the harness fails: {error}") from error
    return {task: _numbers(metrics) for task, metrics in found["results"].items()}


def _numbers(metrics: dict) -> dict[str, float]:
    """Metrics with the filter they belong to: {"exact_match,strict": 0.5}."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
