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


def study(cfg: StudyConfig, ranks: Ranks) -> str:
    """Run what is missing of the study in `cfg.run_dir`; returns its table in Markdown.

    One stream of statistics a seed serves all methods and sparsities. A result, once there, is not computed again.
    """
    if not (cfg.methods and cfg.targets and cfg.seeds):
        raise StunError("study: methods, targets and seeds are needed")
    folder = Path(cfg.run_dir)
    dense = _once(folder / "dense.json", lambda: evaluate(cfg.model.path, cfg.task, ranks), ranks)
    results = {}
    for seed in cfg.seeds:
        seeded = replace(cfg, calibration=replace(cfg.calibration, seed=seed), run_dir=str(folder / f"seed-{seed}"))
        take_statistics(seeded, ranks)
        for target in cfg.targets:
            for method, overrides in cfg.methods.items():
                own = replace(with_overrides(seeded, overrides), target=target)
                cell = folder / f"seed-{seed}" / f"{target} {method}"
                results[method, target, seed] = _once(
                    cell.with_name(cell.name + ".json"), lambda own=own, cell=cell: _cell(own, cell, cfg, ranks), ranks
                )
                ranks.log(f"{method} at {target}, seed {seed}: {_score(results[method, target, seed], 1):.3f}")
    return markdown(cfg, dense, results)


def _once(file: Path, compute, ranks: Ranks) -> dict:
    """The content of a result file, computed and written where it is not there."""
    known = ranks.on_first(lambda: json.loads(file.read_text()) if file.is_file() else None)
    if known is None:
        known = compute()
        ranks.on_first(lambda: (file.parent.mkdir(parents=True, exist_ok=True), write_json(file, known)))
    return known


def _cell(own: StudyConfig, cell: Path, cfg: StudyConfig, ranks: Ranks) -> dict:
    """One method at one sparsity on one seed: plan, prune, evaluate; the pruned checkpoint is not kept."""
    plan = cell.with_name(cell.name + ".plan.json")
    if own.experts.fraction:
        ranks.on_first(lambda: plan_from_run(own, plan) and None)
        own = replace(own, plan=str(plan))
    summary = prune(replace(own, run_dir=str(cell)), ranks)
    result = evaluate(f"{cell}/model", cfg.task, ranks) | {"prune": summary}
    ranks.on_first(lambda: shutil.rmtree(cell))
    return result


def _score(result: dict, half: int) -> float:
    """Exact match, averaged over the groups of the rows whose number has remainder `half`."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for number, (group, right) in enumerate(zip(result["groups"], result["right"], strict=True)):
        if number % 2 == half:
            groups[group].append(right)
    return mean(mean(hits) for hits in groups.values())


def markdown(cfg: StudyConfig, dense: dict, results: dict) -> str:
    """The table: a line per method, a column per sparsity, the mean over seeds and their standard deviation."""
    lines = []
    for half, title in ((1, "reported (odd rows)"), (0, "chosen by (even rows)")):
        lines += [f"| {title}; dense {_score(dense, half):.3f} | {' | '.join(map(str, cfg.targets))} |"]
        lines += ["|---" * (len(cfg.targets) + 1) + "|"]
        for method in cfg.methods:
            cells = []
            for target in cfg.targets:
                scores = [_score(results[method, target, seed], half) for seed in cfg.seeds]
                spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
                cells.append(f"{mean(scores):.3f}{spread}")
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
