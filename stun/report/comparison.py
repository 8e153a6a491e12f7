"""Page that compares runs: the best ones, a table, and the Pareto fronts of quality against size and sparsity."""

import re
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from urllib.parse import quote

from stun.files import write_atomically
from stun.report import html, quality_charts, wording
from stun.report.page import FOLDER, PAGE, bytes_in_words
from stun.report.png import pictures
from stun.report.quality import Measure, Point, dense_models, fronts, quality_measure
from stun.run.ownership import own_folder

_LONGEST = 30  # characters of a name in a picture


def write_comparison(folder: Path, runs: dict[str, dict | str]) -> Path:
    """Write the page that compares the runs below `folder`, whose own pages exist already; returns its path."""
    complete = {name: run for name, run in runs.items() if isinstance(run, dict)}
    target, title, measure = folder / FOLDER, folder.resolve().name, quality_measure(complete)
    own_folder(target, "report")
    parts = [_table(complete)]
    if measure:
        parts = [_best(complete, measure), *parts, *_fronts(target, complete, measure)]
    incomplete = [[html.breakable(name), html.breakable(run)] for name, run in runs.items() if isinstance(run, str)]
    if incomplete:
        table = html.table([], incomplete, "words")
        parts.append(html.section("Without a page", "Runs that are not complete or cannot be read.", table, True))
    commands = []
    if complete and measure is None:  # for the first run: those of the others differ in the folder
        name, run = next(iter(complete.items()))
        commands = wording.commands(run.get("source", "MODEL"), str(folder / name), folder / "dense.json")
    header = html.header(f"{len(complete)} runs compared", title, wording.of_runs(measure, complete), commands)
    body = f'{header}\n<div class="sections">{chr(10).join(parts)}</div>'
    file = target / PAGE
    write_atomically(file, lambda path: path.write_text(html.page(f"{title}: pruning compared", body)))
    return file


def _best(runs: dict[str, dict], measure: Measure) -> str:
    """Section with the best run at each size: those on a front, the smallest first."""
    by_cost = fronts(runs, measure)
    points = sorted((p for p in by_cost["bytes"] or by_cost["share"] if p.is_best), key=lambda point: point.cost)
    rows = [[_link(p.name), _size(runs[p.name]), f"{runs[p.name]['sparsity']:.1%}", *_beside(p, measure)] for p in points]
    header = ["run", "on disk", "sparsity", measure.name, *(["of dense"] if len(measure.dense) == 1 else [])]
    aid = "No run of that size or smaller is better."
    return html.section("The best run at each size", aid, html.table(header, rows, "runs"), True)


def _beside(point: Point, measure: Measure) -> list[str]:
    """Quality of a point, and what it is of the one dense model's."""
    cells = [f"{point.quality:.3f}"]
    if len(measure.dense) == 1:
        (dense,) = measure.dense.values()
        cells.append(f"{point.quality / dense:.1%}" if dense else "-")
    return cells


def _table(runs: dict[str, dict]) -> str:
    rows = [_row(escape(name), run) for name, run in dense_models(runs).items()]
    rows += [_row(_link(name), run) for name, run in runs.items()]
    header = ["run", "sparsity", "experts", "on disk", "exact match", "perplexity", "seconds", "peak, GiB"]
    aid = "The dense model first. Names link to each run's own page."
    return html.section("The runs", aid, html.table(header, rows, "runs"), True)


def _row(name: str, run: dict) -> list[str]:
    result = run.get("result", {})
    scores = [f"{result[key]:.3f}" if key in result else "-" for key in ("average", "perplexity")]
    cost = [f"{run['seconds']:.0f}", f"{run['peak_bytes'] / 2**30:.2f}"] if "seconds" in run else ["-", "-"]
    return [name, f"{run['sparsity']:.1%}", f"{sum(run['kept'])}/{sum(run['experts'])}", _size(run), *scores, *cost]


def _size(run: dict) -> str:
    return bytes_in_words(run["disk_bytes"]) if run.get("disk_bytes") else "-"


def _link(name: str) -> str:
    return f'<a href="{quote(f"../{name}/{FOLDER}/{PAGE}")}">{html.breakable(name)}</a>'


def _fronts(folder: Path, runs: dict[str, dict], measure: Measure) -> list[str]:
    """Sections with the pictures of the fronts."""
    largest = max((run.get("disk_bytes") or 0 for run in runs.values()), default=0)
    scale, unit = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    labels = {
        "bytes": ("Quality and size", f"on disk, {unit}", scale),
        "share": ("Quality and sparsity", "share of the parameters kept", 1),
    }
    parts, aid, shorter = [], _aid(runs, measure), short_names(list(runs))
    for cost, points in fronts(runs, measure).items():
        title, label, divisor = labels[cost]
        shown = [replace(p, name=shorter[p.name], cost=p.cost / divisor) for p in points]
        if shown:
            figure_of = partial(quality_charts.front, points=shown, xlabel=label, measure=measure)
            parts.append(html.section(title, aid, pictures(folder, f"front-{cost}", figure_of, title)))
    return parts


def _aid(runs: dict[str, dict], measure: Measure) -> str:
    excluded = [name for name, run in runs.items() if run.get("result") and name not in measure.runs]
    others = f" Not shown, since evaluated on something else: {', '.join(excluded)}." if excluded else ""
    where = "Higher" if measure.more_is_better else "Lower"
    return f"{where} is better, and so is smaller. No other run beats one on the line in both.{others}"


def short_names(names: list[str]) -> dict[str, str]:
    """Names for a picture: of a sweep's settings (`key-value+key-value`) those that differ, by the last part of their keys, cut
    in the middle if still too long; the whole names if that makes two of them equal."""
    parts = {name: name.split("+") for name in names}
    common = set.intersection(*map(set, parts.values())) if len(names) > 1 else set()
    short = {name: "+".join(p for p in own if p not in common) or name for name, own in parts.items()}
    short = {name: re.sub(r"(^|(?<=\+))[\w.]+\.(?=[A-Za-z_]\w*-)", "", text) for name, text in short.items()}
    half = _LONGEST // 2
    short = {name: text if len(text) <= _LONGEST else f"{text[:half]}…{text[1 - half :]}" for name, text in short.items()}
    return short if len(set(short.values())) == len(names) else {name: name for name in names}
