"""Comparison of pruning methods at several sparsities, or numbers of experts alone, and seeds of the calibration text.

The task's rows are split into two halves, so that a choice made on one half can be checked on the other.
"""

import itertools
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev

from stun.benchmark.config import CompareConfig, StudyConfig
from stun.checkpoint.hub import fetched
from stun.config import Budget, CalibrationConfig, ModelConfig, Score, StunError, with_overrides
from stun.evaluation.config import EvaluateConfig
from stun.evaluation.job import evaluate
from stun.evaluation.request import kinds_of
from stun.evaluation.task import scores
from stun.files import load_json, write_json
from stun.planning.from_statistics import plan_from_run
from stun.planning.job import resolve_model
from stun.planning.validation import validate
from stun.pruning.job import prune, take_statistics
from stun.report.quality import exact_match
from stun.run.folder import SUMMARY
from stun.run.identity import differences, plain
from stun.run.ownership import remove_run
from stun.runtime.ranks import Ranks
from stun.schema import TEXT, check_output, load_record

_SCORED = kinds_of({"rows": True, "sequences": True})  # kind of every result
_SCORES = {"dense": {}, "results": {TEXT: {}}}  # kind of a study's scores
ORDER = ["reference", "qwen3_moe", "deepseek_v3", "gpt_oss"]  # methods were chosen on the first two


def study(cfg: StudyConfig, ranks: Ranks) -> dict:
    """Run or resume the study in `cfg.run_dir`; returns its scores, from which `markdown` makes tables.

    All methods and shares share the statistics of a seed. Finished results are not computed again.
    """
    if cfg.scores:
        ranks.on_first(lambda: check_output(Path(cfg.scores), _SCORES, f"scores={cfg.scores}"))
    cfg = fetched(cfg, ranks)
    folder, method_cfgs = Path(cfg.run_dir), _method_configs(cfg)
    task = {"task": asdict(cfg.task)} | ({"text": asdict(cfg.text)} if cfg.text != CalibrationConfig() else {})
    evaluation = EvaluateConfig(cfg.model, cfg.task, cfg.text, output=f"{folder}/dense-result.json")
    dense = _once(folder / "dense.json", task, _SCORED, lambda: evaluate(evaluation, ranks), ranks)
    results: dict[str, dict[str, list]] = {m: {str(share): [] for share in _shares(cfg)} for m in cfg.methods}
    outliers = any(method_cfg.sparsify.counts_outliers for method_cfg in method_cfgs.values())
    base_sparsify = replace(cfg.sparsify, ratios="owl") if outliers else cfg.sparsify
    sums = any(method_cfg.experts.sums_outputs for method_cfg in method_cfgs.values())
    base_experts = replace(cfg.experts, score=Score.residual) if sums else cfg.experts
    for seed in cfg.seeds:
        calibration, base = replace(cfg.calibration, seed=seed), str(folder / f"seed-{seed}")
        take_statistics(replace(cfg, calibration=calibration, run_dir=base, sparsify=base_sparsify, experts=base_experts), ranks)
        for share, (method, method_cfg) in itertools.product(_shares(cfg), method_cfgs.items()):
            cell = replace(_removing(method_cfg, share), calibration=calibration, run_dir=f"{base}/{share} {method}")
            made = {key: plain(getattr(method_cfg, key)) for key in ("experts", "sparsify", "output", "precision")}
            identity = task | {"overrides": list(cfg.methods[method]), "settings": made}
            compute = lambda cell=cell, base=base: prune_and_evaluate(_planned(cell, base, ranks), ranks, text=cfg.text)  # noqa: E731
            result = _once(Path(f"{cell.run_dir}.json"), identity, {**_SCORED, "prune": SUMMARY}, compute, ranks)
            ranks.on_first(lambda cell=cell: remove_run(Path(cell.run_dir)))
            results[method][str(share)].append(_measures(result))
            ranks.log(f"{method} at {share}, seed {seed}: {_measures(result)['odd']:.3f}")
    removed = "total sparsity" if cfg.targets else "experts removed"
    return {"dense": _measures(dense), "seeds": list(cfg.seeds), "removed": removed, "results": results}


def _shares(cfg: StudyConfig) -> list[float]:
    """Shares to remove: of all weights, or of the experts alone."""
    return cfg.targets or cfg.drops


def _removing(cfg: StudyConfig, share: float) -> StudyConfig:
    """Configuration that removes one of the shares."""
    if cfg.targets:
        return replace(cfg, target=share)
    return replace(cfg, target=None, experts=replace(cfg.experts, drop=share))


def _method_configs(cfg: StudyConfig) -> dict[str, StudyConfig]:
    """Configuration of every method. Raises StunError, before anything is computed, if a method cannot remove a share."""
    if not (cfg.methods and cfg.seeds and bool(cfg.targets) != bool(cfg.drops)):
        raise StunError("study: methods, seeds and either targets or drops are needed")
    method_cfgs = {method: with_overrides(cfg, overrides) for method, overrides in cfg.methods.items()}
    unknown = sorted(set(cfg.measures) - TITLES.keys())
    if unknown:
        raise StunError(f"study: measures={unknown}: must be among {', '.join(TITLES)}")
    fixed = ("model", "calibration", "target", "run_dir", "plan", "task", "text")
    for method, method_cfg in method_cfgs.items():
        if any(getattr(method_cfg, key) != getattr(cfg, key) for key in fixed):
            raise StunError(f"study: methods.{method} may change experts and sparsify only")
    for seed in cfg.seeds:
        validate(replace(_removing(cfg, _shares(cfg)[0]), calibration=replace(cfg.calibration, seed=seed)))
    for method_cfg, share in itertools.product(method_cfgs.values(), _shares(cfg)):
        resolve_model(_removing(method_cfg, share))
    return method_cfgs


def _once(file: Path, identity: dict, kind: dict, compute, ranks: Ranks) -> dict:
    """Result of that kind in a file, computed and written if the file does not exist. Raises StunError if its identity is
    another."""

    def stored() -> dict | None:
        if not file.is_file():
            return None
        content = load_record(file, {"of": {}, "result": kind}, "remove it to compute it again")
        if changes := differences(content["of"], identity):
            raise StunError(f"{file}: holds the result of another request ({'; '.join(changes)}); choose another run_dir")
        return content["result"]

    result = ranks.on_first(stored)
    if result is None:
        result = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        ranks.on_first(lambda: write_json(file, {"of": identity, "result": result}))
    return result


def _planned(cell: StudyConfig, base: str, ranks: Ranks) -> StudyConfig:
    """Configuration of one method, share and seed; if it needs a plan, with one from the statistics in `base`."""
    experts = cell.experts
    if not (experts.fraction or cell.is_counted or cell.sparsify.counts_outliers):
        return cell
    if experts.fraction == "auto" or experts.budget is Budget.measured:
        return replace(cell, statistics=base)  # the run itself searches and measures
    plan = Path(f"{cell.run_dir}.plan.json")
    ranks.on_first(lambda: plan_from_run(replace(cell, run_dir=base), plan) and None)
    given = replace(cell, plan=str(plan), fit="", experts=replace(experts, keep=None, drop=None))
    return replace(given, sparsify=replace(cell.sparsify, ratios="uniform"))  # the plan has the ratios


def prune_and_evaluate(cfg: CompareConfig, ranks: Ranks, dense: str = "", text: CalibrationConfig | None = None) -> dict:
    """Result of the pruned model on its task and a text, compared with that in the file `dense` if given; the summary is under
    `prune`."""
    summary, model = prune(cfg, ranks), ModelConfig(f"{cfg.run_dir}/model")
    asked = EvaluateConfig(model, cfg.task, text or CalibrationConfig(), dense=dense, output=f"{cfg.run_dir}/result.json")
    result = evaluate(asked, ranks)
    return result | {"prune": summary}


def _measures(result: dict) -> dict[str, float]:
    """Exact match on the even and on the odd rows, averaged over groups; perplexity; of a pruned model also sparsity, and
    the time and memory of pruning."""
    even, odd = (scores(result["right"][half::2], result["groups"][half::2])["average"] for half in (0, 1))
    measures = {"odd": odd, "even": even, "perplexity": result["perplexity"]}
    if "prune" in result:
        pruned = result["prune"]
        measures |= {"sparsity": pruned["sparsity"], "seconds": pruned["seconds"], "GiB": pruned["peak_bytes"] / 2**30}
    return measures


TITLES = {
    "odd": "Exact match, odd rows",
    "even": "Exact match, even rows",
    "perplexity": "Perplexity, all rows",
    "seconds": "Seconds to prune",
    "GiB": "Peak memory of a rank, GiB",
}


def markdown(scores: dict, measures: list[str]) -> str:
    """Markdown table per measure (a key of `TITLES`): rows are methods, columns shares removed; mean ± deviation over seeds."""
    lines, seeds = [], ", ".join(map(str, scores["seeds"]))
    targets = list(next(iter(scores["results"].values())))
    for measure in measures:
        dense = f" Dense: {scores['dense'][measure]:.3f}." if measure in scores["dense"] else ""
        lines += [f"{TITLES[measure]}.{dense} Seeds of the calibration text: {seeds}.", ""]
        lines += [f"| {scores.get('removed', 'total sparsity')} | {' | '.join(targets)} |", "|---" * (len(targets) + 1) + "|"]
        for method, by_target in scores["results"].items():
            cells = [_cell_text([result[measure] for result in by_target[target]], measure) for target in targets]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell_text(values: list[float], measure: str) -> str:
    digits = {"seconds": 1, "GiB": 2}.get(measure, 3)
    spread = len(values) > 1 and measure not in ("seconds", "GiB")
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.3f}" if spread else "")


def read_scores(folder: Path, *kinds: str) -> dict[str, dict]:
    """Scores of studies by model, from the files KIND-MODEL.json of a folder; the methods of later kinds come last."""
    scores: dict[str, dict] = {}
    for kind, model in itertools.product(kinds, ORDER):
        file = folder / f"{kind}-{model}.json"
        if file.is_file():
            own = load_json(file)
            scores.setdefault(model, own)["results"] |= own["results"]
    return scores


def across(scores: dict[str, dict], share: str) -> str:
    """Markdown table at one share removed: exact match, and in brackets the percentage of the dense model's that is kept."""
    dense = {model: exact_match([own["dense"]]) for model, own in scores.items()}
    lines = [f"| {share} removed | {' | '.join(scores)} |", "|---" * (len(scores) + 1) + "|"]
    lines.append(f"| dense | {' | '.join(f'{value:.3f}' for value in dense.values())} |")
    for method in next(iter(scores.values()))["results"]:
        cells = []
        for model, own in scores.items():
            results = own["results"].get(method, {}).get(share)  # not every model was asked for everything
            cells.append(_kept_text(results, dense[model]) if results else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _kept_text(results: list[dict], dense: float) -> str:
    """Exact match, its standard deviation over seeds, if there are several, and the percentage of the dense model's."""
    kept, spread = exact_match(results), ""
    if len(results) > 1:
        spread = f" ± {stdev(exact_match([result]) for result in results):.3f}"
    return f"{kept:.3f}{spread} ({kept / dense:.1%})"
