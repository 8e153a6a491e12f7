"""Quality of several runs, or of a study's methods, beside one another and beside the dense models they were pruned from."""

import json
from collections import Counter
from dataclasses import dataclass
from statistics import mean

from stun.evaluation.request import SAME

# Measure, its key in result.json, whether more is better.
_QUALITY = (("exact match", "average", True), ("perplexity", "perplexity", False), ("KL to the dense model", "kl", False))


@dataclass(frozen=True)
class Point:
    """Cost (lower is better) and quality of a run; `is_best` if it is on the Pareto front."""

    name: str
    cost: float
    quality: float
    is_best: bool = False


@dataclass(frozen=True)
class Measure:
    """Quality of the evaluated runs and of the dense models, by name."""

    name: str
    more_is_better: bool
    runs: dict[str, float]
    dense: dict[str, float]

    @property
    def best(self) -> str:
        """Name of the best run."""
        return max(self.runs, key=lambda name: self.runs[name] if self.more_is_better else -self.runs[name])


def pareto(points: list[Point], more_is_better: bool) -> list[Point]:
    """The points, with `is_best` set for those on the Pareto front: no other is as good in both and better in one."""
    sign = 1 if more_is_better else -1

    def beats(first: Point, second: Point) -> bool:
        no_worse = first.cost <= second.cost and sign * first.quality >= sign * second.quality
        return no_worse and (first.cost, first.quality) != (second.cost, second.quality)

    return [Point(p.name, p.cost, p.quality, not any(beats(other, p) for other in points)) for p in points]


def quality_measure(runs: dict[str, dict]) -> Measure | None:
    """The measure that most of the comparable runs have, the earlier of `_QUALITY` of equals; None if no run was evaluated."""
    comparable, dense = alike(runs), dense_models(runs)
    measures = [Measure(name, more, _values(comparable, key), _values(dense, key)) for name, key, more in _QUALITY]
    measure = max(measures, key=lambda measure: len(measure.runs))
    return measure if measure.runs else None


def alike(runs: dict[str, dict]) -> dict[str, dict]:
    """The largest set of runs evaluated on the same task and text; only their scores can be compared."""
    requests = {}
    for name, run in runs.items():
        request = run.get("result", {}).get("request", {})
        if run.get("result"):
            requests[name] = json.dumps([request.get(key) for key in SAME], sort_keys=True)
    most = Counter(requests.values()).most_common(1)
    return {name: runs[name] for name, text in requests.items() if text == most[0][0]}


def dense_models(runs: dict[str, dict]) -> dict[str, dict]:
    """The models that were pruned, each like the summary of a run that removed nothing: `sparsity`, `experts`, `kept`, bytes on
    disk, and as `result` what the runs' evaluations say of it."""
    by_source: dict[str, dict[str, dict]] = {}
    for name, run in runs.items():
        by_source.setdefault(run.get("source", ""), {})[name] = run
    comparable, models = alike(runs), {}
    for source, group in by_source.items():
        evaluated = [run for name, run in group.items() if name in comparable]
        models[f"dense {source}" if len(by_source) > 1 else "dense"] = _dense(list(group.values()), evaluated)
    return models


def _dense(runs: list[dict], comparable: list[dict]) -> dict:
    """... of `runs` that were pruned from it; of those evaluated alike, `comparable` ones, come its scores."""
    evaluated = next((run["result"]["dense"] for run in comparable if run["result"].get("dense")), {})
    scores = {key: evaluated[key] for key in ("average", "perplexity") if key in evaluated}
    experts, size = runs[0]["experts"], runs[0].get("source_bytes")
    result = scores | {"agreement": {"kl": 0.0}}
    return {"sparsity": 0.0, "experts": experts, "kept": experts, "disk_bytes": size, "result": result}


def _values(runs: dict[str, dict], key: str) -> dict[str, float]:
    results = {name: run.get("result", {}) for name, run in runs.items()}
    values = {name: result.get(key, result.get("agreement", {}).get(key)) for name, result in results.items()}
    return {name: value for name, value in values.items() if value is not None}


def fronts(runs: dict[str, dict], measure: Measure) -> dict[str, list[Point]]:
    """Fronts of quality against `bytes` on disk and against the `share` of parameters kept, over the evaluated runs."""
    cost = {"bytes": lambda run: run.get("disk_bytes"), "share": lambda run: 1 - run["sparsity"]}
    rows = {c: [Point(n, of(runs[n]), q) for n, q in measure.runs.items() if of(runs[n])] for c, of in cost.items()}
    return {name: pareto(points, measure.more_is_better) for name, points in rows.items()}


def exact_match(results: list[dict]) -> float:
    """Exact match on all rows, mean over the seeds of a study."""
    return mean((result["odd"] + result["even"]) / 2 for result in results)
