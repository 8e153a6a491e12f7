"""Pictures of quality: runs against their cost, methods against sparsity. The dense model is a line, every point or line has its
name beside the picture, and the vertical axis is the difference from the dense model."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stun.report.quality import Measure, Point, exact_match
from stun.report.theme import DPI, Theme, canvas, legend, words

_LINE = 0.17  # inches of a name
_STEPS = [sign * step * 10.0**power for power in range(-4, 4) for step in (1, 2, 5) for sign in (-1, 1)]


@dataclass(frozen=True)
class Name:
    """Name of a point or of a line's end."""

    text: str
    x: float
    y: float
    color: str


def front(theme: Theme, points: list[Point], xlabel: str, measure: Measure) -> Figure:
    """Runs, those on the Pareto front joined by a line."""
    figure, (axes,) = canvas(theme, max(3.0, 1.2 + _LINE * (len(points) + len(measure.dense))))
    height = _difference(axes, measure.name, measure.dense, list(measure.runs.values()))
    best = sorted((p.cost, height(p.quality)) for p in points if p.is_best)
    axes.plot(*zip(*best, strict=True), color=theme.kept, linewidth=1.4, zorder=2)
    names = []
    for is_best, color, label in ((True, theme.kept, "on the front"), (False, theme.faint, "beaten by another")):
        group = [Name(f"{p.name}  {p.quality:.3f}", p.cost, height(p.quality), color) for p in points if p.is_best is is_best]
        if group:
            axes.scatter([n.x for n in group], [n.y for n in group], s=40, color=color, label=label, zorder=3)
        names += group
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.margins(0.1)
    legend(axes, theme)
    _name(axes, theme, [*names, *_dense_lines(axes, theme, measure.dense, height)])
    return figure


def methods(theme: Theme, scores: dict, chosen: list[str] | None = None) -> Figure:
    """Exact match against sparsity, a line per method: the `chosen` ones, or all, of the scores that jobs.study writes. Exact
    match is the mean over the seeds and both halves of the rows."""
    lines = {name: scores["results"][name] for name in chosen or scores["results"]}
    values = {m: {float(t): exact_match(seeds) for t, seeds in by.items()} for m, by in lines.items()}
    figure, (axes,) = canvas(theme, max(3.2, 1.1 + _LINE * (len(lines) + 1)))
    dense = {"dense": exact_match([scores["dense"]])}
    height = _difference(axes, "exact match", dense, [value for line in values.values() for value in line.values()])
    names = []
    for place, (method, line) in enumerate(values.items()):
        color, (x, y) = theme.colors[place % len(theme.colors)], (list(line), [height(value) for value in line.values()])
        axes.plot(x, y, color=color, linewidth=2, marker="o", markersize=5, zorder=2)
        names.append(Name(f"{method}  {line[x[-1]]:.3f}", x[-1], y[-1], color))
    alone = scores.get("removed") == "experts removed"
    axes.set_xlabel("experts removed from every layer" if alone else "total sparsity of the decoder layers")
    axes.xaxis.set_major_locator(ticker.MultipleLocator(0.1))
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
    _name(axes, theme, [*names, *_dense_lines(axes, theme, dense, height)])
    return figure


def _difference(axes: Axes, measure: str, dense: dict[str, float], values: list[float]) -> Callable[[float], float]:
    """Label the vertical axis of the measure; returns what it shows of a value: with one dense model the difference from it, on a
    root scale if most differences are small beside the largest."""
    if len(dense) != 1:
        axes.set_ylabel(measure)
        return lambda value: value
    (base,) = dense.values()
    differences = [value - base for value in values]
    sizes = list(map(abs, differences))
    label = f"{measure}, minus dense {base:.3f}" if base else measure
    if median(sizes) < max(sizes) / 4:
        label += "\non a root scale"
        axes.set_yscale("function", functions=(_root, lambda y: np.sign(y) * np.square(y)))
        axes.yaxis.set_major_locator(ticker.FixedLocator(_root_ticks(min(differences), max(differences))))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:+g}" if y and base else f"{y:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_ylabel(label)
    return lambda value: value - base


def _root(y: np.ndarray) -> np.ndarray:
    return np.sign(y) * np.sqrt(np.abs(y))


def _root_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, zero among them, that a root scale does not put too close."""
    low, high, ticks = min(low, 0.0), max(high, 0.0), [0.0]
    least = (_root(high) - _root(low)) / 9
    for step in sorted((step for step in _STEPS if low <= step <= high), key=abs):
        if min(abs(_root(step) - _root(tick)) for tick in ticks) >= least:
            ticks.append(step)
    return sorted(ticks)


def _dense_lines(axes: Axes, theme: Theme, dense: dict[str, float], height: Callable[[float], float]) -> list[Name]:
    """Draw a line for each dense model; returns their names, at the right end."""
    names = []
    for name, value in dense.items():
        axes.axhline(height(value), color=theme.ink, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        names.append(Name(f"{name}  {value:.3f}", axes.get_xlim()[1], height(value), theme.ink))
    return names


def _name(axes: Axes, theme: Theme, names: list[Name]) -> None:
    """Write the names in a column beside the panel, in the order of their points and never over one another, each with a line to
    its point."""
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, *(n.y for n in names)), max(high, *(n.y for n in names)))
    axes.set_xlim(axes.get_xlim())
    axes.figure.draw_without_rendering()  # only then is it known how high the panel is
    ordered = sorted(names, key=lambda name: name.y)
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((name.x, name.y))[1]) for name in ordered]
    heights = _apart(wanted, _LINE * DPI / axes.get_window_extent().height)
    line = {"arrowstyle": "-", "color": theme.line, "linewidth": 0.8, "shrinkA": 2, "shrinkB": 3, "relpos": (0, 0.5)}
    for name, height in zip(ordered, heights, strict=True):
        text = {"textcoords": "axes fraction", "va": "center", "color": name.color, "fontsize": 9, "zorder": 1}
        axes.annotate(words(name.text), (name.x, name.y), xytext=(1.04, height), arrowprops=line, **text)


def _apart(wanted: list[float], gap: float) -> list[float]:
    """Ascending heights near the `wanted` ones, which ascend, `gap` apart, and all of a name below 1 if they fit."""
    heights = []
    for height in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    limit = 1 - gap / 2
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], limit)
        limit = heights[place] - gap
    return heights
