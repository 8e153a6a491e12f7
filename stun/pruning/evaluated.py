"""Evaluation of a run's checkpoint beside the dense model, which is evaluated once."""

from pathlib import Path

from stun.config import ModelConfig, StunError
from stun.evaluation.config import EvaluateConfig, PruneAndEvaluateConfig, TaskConfig
from stun.evaluation.job import check, evaluate, evaluate_tracked
from stun.pruning.job import prune, take_statistics
from stun.report.folder import RESULT
from stun.runtime.ranks import Ranks


def prune_then_evaluate(cfg: PruneAndEvaluateConfig, ranks: Ranks) -> tuple[dict, dict[str, dict]]:
    """Summary of the run and, if a task is given, the results of the dense and the pruned model.

    All ranks call this together. Raises StunError before any work starts if the request cannot be met.
    """
    check_task(cfg, ranks)
    summary = prune(cfg, ranks)
    if not cfg.task.path:
        return summary, {}
    model, output = ModelConfig(f"{cfg.run_dir}/model"), f"{cfg.run_dir}/{RESULT}"
    dense = evaluate(_dense(cfg), ranks)
    pruned = EvaluateConfig(model, cfg.task, dense=_dense(cfg).output, output=output, tracking=cfg.tracking)
    return summary, {"dense": dense, "pruned": evaluate_tracked(pruned, ranks)}


def prepare_sweep(cfg: PruneAndEvaluateConfig, ranks: Ranks) -> None:
    """Take what the runs of a sweep share: the statistics and, if a task is given, the dense model's result."""
    check_task(cfg, ranks)
    take_statistics(cfg, ranks)
    if cfg.task.path:
        evaluate(_dense(cfg), ranks)


def _dense(cfg: PruneAndEvaluateConfig) -> EvaluateConfig:
    return EvaluateConfig(cfg.model, cfg.task, output=cfg.dense or f"{cfg.run_dir}/dense.json")


def check_task(cfg: PruneAndEvaluateConfig, ranks: Ranks) -> None:
    """Raises StunError, before any work, if the task cannot be asked of the model."""
    if cfg.task.path:
        if Path(_dense(cfg).output).resolve() == Path(cfg.run_dir, RESULT).resolve():
            raise StunError(f"dense={cfg.dense}: is the file of the run's own result; give the dense model's")
        check(_dense(cfg), ranks, f"{cfg.run_dir}/{RESULT}")
    elif cfg.dense or cfg.task != TaskConfig():
        raise StunError("task.path: a file or dataset to evaluate on is needed with dense and other settings of task")
