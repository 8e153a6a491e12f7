"""Page that compares runs: a table, and the Pareto fronts of quality against size and sparsity."""

import json
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from stun.evaluation.request import SAME
from stun.files import write_atomically
from stun.report import charts, html
from stun.report.page import FOLDER, PAGE, bytes_in_words
from stun.report.png import pictures
from stun.run.ownership import own_folder

# Measure, its key in result.json, whether more is better.
_QUALITY = (("exact match", "average", True), ("perplexity", "perplexity", False), ("KL to the dense model", "kl", False))


@dataclass(frozen=True)
class Point:
    """Cost (lower is better) and quality of a run; `is_best` if it is on the Pareto front."""

    name: str
    cost: float
    quality: float
    is_best: bool = False


def pareto(points: list[Point], more_is_better: bool) -> list[Point]:
    """The points, with `is_best` set for those on the Pareto front: no other is as good in both and better in one."""
    sign = 1 if more_is_better else -1

    def beats(first: Point, second: Point) -> bool:
        no_worse = first.cost <= second.cost and sign * first.quality >= sign * second.quality
        return no_worse and (first.cost, first.quality) != (second.cost, second.quality)

    return [Point(p.name, p.cost, p.quality, not any(beats(other, p) for other in points)) for p in points]


def quality_of(runs: dict[str, dict]) -> tuple[str, bool, dict[str, float]]:
    """(Name, whether more is better, values by run) of the measure that most runs have; ties go to the earlier of `_QUALITY`."""
    measures = [(name, more, _values(runs, key)) for name, key, more in _QUALITY]
    return max(measures, key=lambda measure: len(measure[2]))


def alike(runs: dict[str, dict]) -> dict[str, dict]:
    """The largest set of runs evaluated on the same task and text; only their scores can be compared."""
    requests = {}
    for name, run in runs.items():
        request = run.get("result", {}).get("request", {})
        if run.get("result"):
            requests[name] = json.dumps([request.get(key) for key in SAME], sort_keys=True)
    most = Counter(requests.values()).most_common(1)
    return {name: runs[name] for name, text in requests.items() if text == most[0][0]}


def _values(runs: dict[str, dict], key: str) -> dict[str, float]:
    results = {name: run.get("result", {}) for name, run in runs.items()}
    values = {name: result.get(key, result.get("agreement", {}).get(key)) for name, result in results.items()}
    return {name: value for name, value in values.items() if value is not None}


def write_comparison(folder: Path, runs: dict[str, dict | str]) -> Path:
    """Write the page that compares the runs below `folder`, whose own pages exist already; returns its path."""
    complete = {name: run for name, run in runs.items() if isinstance(run, dict)}
    target = folder / FOLDER
    own_folder(target, "report")
    title = folder.resolve().name
    rows = [_row(number, name, run) for number, (name, run) in enumerate(complete.items(), 1)]
    header = ["", "run", "sparsity", "experts", "on disk", "exact match", "perplexity", "seconds", "peak, GiB"]
    parts = [
        html.section(
            "The runs",
            "Numbers are those in the pictures; names link to each run's own page.",
            html.table(header, rows, "runs"),
            True,
        )
    ]
    parts += _fronts(target, complete)
    incomplete = [[escape(name), escape(run)] for name, run in runs.items() if isinstance(run, str)]
    if incomplete:
        parts.append(html.section("Not complete", "Runs without a page.", html.table([], incomplete, "words"), True))
    eyebrow = f'<header><p class="eyebrow">{len(complete)} runs compared</p><h1>{escape(title)}</h1></header>'
    file = target / PAGE
    body = f'{eyebrow}\n<div class="sections">{chr(10).join(parts)}</div>'
    write_atomically(file, lambda path: path.write_text(html.page(f"{title}: pruning compared", body)))
    return file


def _row(number: int, name: str, run: dict) -> list[str]:
    result = run.get("result", {})
    scores = [f"{result[key]:.3f}" if key in result else "-" for key in ("average", "perplexity")]
    size = bytes_in_words(run["disk_bytes"]) if run.get("disk_bytes") else "-"
    link = f'<a href="{quote(f"../{name}/{FOLDER}/{PAGE}")}">{escape(name)}</a>'
    memory = f"{run['peak_bytes'] / 2**30:.2f}"
    kept = f"{sum(run['kept'])}/{sum(run['experts'])}"
    return [str(number), link, f"{run['sparsity']:.1%}", kept, size, *scores, f"{run['seconds']:.0f}", memory]


def fronts(runs: dict[str, dict]) -> dict[str, list[Point]]:
    """Fronts of quality against `bytes` on disk and against the `share` of parameters kept, over the evaluated runs."""
    _, more, quality = quality_of(alike(runs))
    cost = {"bytes": lambda run: run.get("disk_bytes"), "share": lambda run: 1 - run["sparsity"]}
    rows = {name: [(n, cost_of(runs[n]), q) for n, q in quality.items() if cost_of(runs[n])] for name, cost_of in cost.items()}
    return {name: pareto([Point(*point) for point in points], more) for name, points in rows.items()}


def _fronts(folder: Path, runs: dict[str, dict]) -> list[str]:
    comparable = alike(runs)
    measure, more, quality = quality_of(comparable)
    aid = f"No other run beats a run on the line in both; {'up' if more else 'down'} and to the left is better."
    largest = max((run.get("disk_bytes") or 0 for run in runs.values()), default=0)
    scale, unit = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    titles = {
        "bytes": ("Quality and size", f"on disk, {unit}"),
        "share": ("Quality and sparsity", "share of the parameters kept"),
    }
    if not quality:
        command = "python -m jobs.evaluate model.path=RUN/model task.path=ROWS.jsonl output=RUN/result.json"
        return [html.section("Quality and size", aid, html.none("No run was evaluated. For each run:", command))]
    order = {name: number for number, name in enumerate(runs)}
    excluded = [f"{order[name] + 1}" for name, run in runs.items() if run.get("result") and name not in comparable]
    if excluded:
        aid += f" Not shown, since evaluated on something else: {', '.join(excluded)}."
    parts = []
    for name, points in fronts(runs).items():
        title, label = titles[name]
        shown = [(p.name, p.cost / (scale if name == "bytes" else 1), p.quality, p.is_best, order[p.name] + 1) for p in points]
        if shown:
            drawn = pictures(folder, f"front-{name}", lambda theme, s=shown, x=label: charts.front(theme, s, x, measure), title)
            parts.append(html.section(title, aid, drawn))
    return parts
