"""Tasks of the lm-evaluation-harness, for models that fit in the first rank's memory: pip install 'stun-moe[eval]'."""

import functools
import importlib.util
import logging
from pathlib import Path

import torch

from stun.config import StunError
from stun.data.tokenizer import load_tokenizer
from stun.evaluation.config import HarnessConfig
from stun.model.whole import load_whole
from stun.runtime.ranks import Ranks


def validate_harness(cfg: HarnessConfig) -> None:
    """Check that the tasks can be run. Raises StunError."""
    if cfg.tasks and importlib.util.find_spec("lm_eval") is None:
        raise StunError(f"harness.tasks={list(cfg.tasks)}: needs the lm-evaluation-harness: pip install 'stun-moe[eval]'")
    if cfg.include_path and not Path(cfg.include_path).is_dir():
        raise StunError(f"harness.include_path={cfg.include_path}: no such folder")
    if cfg.tasks:
        manager = _tasks(tuple(cfg.tasks), cfg.include_path)
        unknown = [task for task in cfg.tasks if not manager.match_tasks([task])]
        if unknown:
            raise StunError(
                f"harness.tasks={unknown}: not known to the lm-evaluation-harness; lm_eval ls tasks lists those that are"
            )


@functools.cache
def _tasks(tasks: tuple[str, ...], include_path: str):
    """The harness's task manager."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Loading the harness's own tasks takes seconds; include_path alone is loaded if it has all the tasks.
    if include_path:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if all(manager.match_tasks([task]) for task in tasks):
            return manager
    return TaskManager(include_path=include_path or None)


def run_harness(folder: Path, cfg: HarnessConfig, ranks: Ranks) -> dict[str, dict[str, float]]:
    """Metrics by task and name. The first rank does the work while the remaining ranks wait, without a time limit."""
    ranks.doing = "harness"
    return ranks.while_waiting(lambda: _run(folder, cfg, ranks.device), ranks.is_first)


def _run(folder: Path, cfg: HarnessConfig, device: torch.device) -> dict[str, dict[str, float]]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = load_whole(folder, dtype=torch.float32 if device.type == "cpu" else "auto").to(device).eval()
    size = "auto" if device.type == "cuda" else 32
    wrapped = HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=size)
    manager = _tasks(tuple(cfg.tasks), cfg.include_path)
    try:
        output = lm_eval.simple_evaluate(wrapped, tasks=list(cfg.tasks), task_manager=manager, log_samples=False)
    except Exception as error:  # the harness and its tasks raise many types
        raise StunError(f"harness.tasks={list(cfg.tasks)}: the harness fails: {error}") from error
    return {task: _numbers(metrics) for task, metrics in output["results"].items()}


def _numbers(metrics: dict) -> dict[str, float]:
    """Metrics by name and filter: {"exact_match,strict": 0.5}."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
