"""Compares ways to choose experts: every method at every sparsity, on several orders of the calibration text.

The rows of the task are halved: methods are chosen by the even rows, and reported on the odd ones.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from stun.checkpoint import write_json
from stun.config import StudyConfig, StunError, with_overrides
from stun.evaluate import evaluate
from stun.planning import plan_from_run
from stun.prune import prune, take_statistics
from stun.ranks import Ranks


def study(cfg: StudyConfig, ranks: Ranks) -> dict:
    """Run what is missing of the study in `cfg.run_dir`; returns its scores, from which `markdown` makes the table.

    One stream of statistics a seed serves all methods and sparsities. A result, once there, is not computed again.
    """
    if not (cfg.methods and cfg.targets and cfg.seeds):
        raise StunError("study: methods, targets and seeds are needed")
    folder = Path(cfg.run_dir)
    dense = _once(folder / "dense.json", lambda: evaluate(cfg.model.path, cfg.task, ranks), ranks)
    scores: dict[str, dict[str, list]] = {m: {str(t): [] for t in cfg.targets} for m in cfg.methods}
    for seed in cfg.seeds:
        seeded = replace(cfg, calibration=replace(cfg.calibration, seed=seed), run_dir=str(folder / f"seed-{seed}"))
        take_statistics(seeded, ranks)
        for target in cfg.targets:
            for method, overrides in cfg.methods.items():
                own = replace(with_overrides(seeded, overrides), target=target)
                cell = folder / f"seed-{seed}" / f"{target} {method}"
                result = _once(Path(f"{cell}.json"), lambda own=own, cell=cell: _cell(own, cell, cfg, ranks), ranks)
                scores[method][str(target)].append(_halves(result))
                ranks.log(f"{method} at {target}, seed {seed}: {_halves(result)[1]:.3f}")
    return {"dense": _halves(dense), "seeds": list(cfg.seeds), "scores": scores}


def _once(file: Path, compute, ranks: Ranks) -> dict:
    """The content of a result file, computed and written where it is not there."""
    known = ranks.on_first(lambda: json.loads(file.read_text()) if file.is_file() else None)
    if known is None:
        known = compute()
        ranks.on_first(lambda: (file.parent.mkdir(parents=True, exist_ok=True), write_json(file, known)))
    return known


def _cell(own: StudyConfig, cell: Path, cfg: StudyConfig, ranks: Ranks) -> dict:
    """One method at one sparsity on one seed: plan, prune, evaluate; the pruned checkpoint is not kept."""
    plan = Path(f"{cell}.plan.json")
    if own.experts.fraction:
        ranks.on_first(lambda: plan_from_run(own, plan) and None)
        own = replace(own, plan=str(plan))
    summary = prune(replace(own, run_dir=str(cell)), ranks)
    result = evaluate(f"{cell}/model", cfg.task, ranks) | {"prune": summary}
    ranks.on_first(lambda: shutil.rmtree(cell))
    return result


def _halves(result: dict) -> list[float]:
    """Exact match, averaged over the groups, on the even rows and on the odd ones."""
    groups: tuple[dict, dict] = defaultdict(list), defaultdict(list)
    for number, (group, right) in enumerate(zip(result["groups"], result["right"], strict=True)):
        groups[number % 2][group].append(right)
    return [mean(mean(hits) for hits in half.values()) for half in groups]


def markdown(scores: dict) -> str:
    """The table: a line per method, a column per sparsity, the mean over seeds and their standard deviation."""
    lines, seeds = [], ", ".join(map(str, scores["seeds"]))
    targets = list(next(iter(scores["scores"].values())))
    for half, title in ((1, "Reported: the odd rows"), (0, "For choosing: the even rows")):
        lines += [f"{title}. Dense: {scores['dense'][half]:.3f}. Seeds of the calibration text: {seeds}.", ""]
        lines += [f"| total sparsity | {' | '.join(targets)} |", "|---" * (len(targets) + 1) + "|"]
        for method, by_target in scores["scores"].items():
            cells = []
            for target in targets:
                own = [pair[half] for pair in by_target[target]]
                cells.append(f"{mean(own):.3f}" + (f" ± {stdev(own):.3f}" if len(own) > 1 else ""))
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
