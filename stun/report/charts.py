"""Pictures of a report, one function per function of stun.report.data."""

import matplotlib.ticker as ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.figure import Figure

from stun.planning.budget import best_fraction
from stun.report.data import Selection, Usage
from stun.report.theme import Theme, canvas, legend, legend_style, words
from stun.run.layer_records import KINDS, PHASES

_STYLES = ("-", (0, (6, 2)), "-", (0, (3, 3)), ":")  # of the kinds: equal lines show through one another
_MOST_DOTS = 2000
_STAGES = {"dense": "dense", "experts_removed": "experts removed", "weights_removed": "weights removed"}


def _by_layer(axes, layers: int) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(ticker.FixedLocator(range(layers)) if layers <= 12 else ticker.MaxNLocator(8, integer=True))
    axes.set_xlim(-0.6, layers - 0.4)


def _line(axes, values: list, color: str, label: str, **style) -> None:
    numbers = [np.nan if value is None else value for value in values]
    settings = {"linewidth": 1.8, "marker": "o", "markersize": 4 if len(values) <= 40 else 0, **style}
    axes.plot(numbers, color=color, label=label, **settings)


def experts_kept(theme: Theme, data: dict[str, list[int]]) -> Figure:
    """Experts before and kept; the removed ones instead where they are so few that all layers would look alike."""
    removed = [before - kept for before, kept in zip(data["experts"], data["kept"], strict=True)]
    if 0 < max(removed) <= max(data["experts"]) / 4:
        axes = _bars(theme, {"removed": (removed, theme.removed)})
        axes.set_ylabel(f"experts removed, of {max(data['experts'])}")
    else:
        axes = _bars(theme, {"before": (data["experts"], theme.line), "kept": (data["kept"], theme.kept)})
        axes.set_ylabel("experts")
        legend(axes, theme)
    return axes.figure


def _bars(theme: Theme, data: dict[str, tuple[list[int], str]]) -> Axes:
    """Bars (numbers by layer, colour), one before the other, the last with its numbers above it."""
    _, (axes,) = canvas(theme, 2.5)
    for name, (numbers, color) in data.items():
        axes.bar(range(len(numbers)), numbers, color=color, width=0.8 if len(numbers) <= 40 else 1.0, label=name)
    for layer, number in enumerate(numbers if len(numbers) <= 16 else ()):
        axes.text(layer, number, f"{number}", ha="center", va="bottom", color=theme.ink, fontsize=9)
    _by_layer(axes, len(numbers))
    axes.margins(y=0.09)  # for the numbers
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    return axes


def usage(theme: Theme, data: list[Usage]) -> Figure:
    """Per source, a map of layers and experts, and beside it the share of the kept experts."""
    figure, _ = canvas(theme, 0.9 + 1.75 * len(data))
    figure.clear()
    panels = figure.subplots(len(data), 2, squeeze=False, width_ratios=(3.2, 1))
    clear = LinearSegmentedColormap.from_list("usage", [(*to_rgba(theme.kept)[:3], 0.0), to_rgba(theme.kept)])
    for source_usage, (left, right) in zip(data, panels, strict=True):
        experts = max(len(share_E) for share_E in source_usage.share_LE)
        times_LE = np.full((len(source_usage.share_LE), experts), np.nan)
        for row, share_E in zip(times_LE, source_usage.share_LE, strict=True):
            row[: len(share_E)] = np.array(share_E) * len(share_E)
        left.imshow(times_LE, aspect="auto", cmap=clear, norm=Normalize(0, 3))
        left.set(xlabel="expert", ylabel="layer with experts")
        right.barh(range(len(source_usage.kept_L)), source_usage.kept_L, color=theme.kept, height=0.8)
        right.set(xlim=(0, 1), ylim=left.get_ylim(), xlabel="kept")
        right.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
        right.set_xticks([0, 0.5, 1])
        right.set_yticks([])
        name = source_usage.source if source_usage.source != "all" else "calibration text"
        left.set_title(words(name), loc="left", fontsize=10, color=theme.ink)
        for axes in (left, right):
            axes.patch.set_alpha(0)
            axes.spines[:].set_color(theme.line)
            axes.tick_params(colors=theme.faint, labelsize=8.5, length=3)
            axes.xaxis.label.set(color=theme.faint, fontsize=9)
            axes.yaxis.label.set(color=theme.faint, fontsize=9)
        left.yaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    return figure


def scores(theme: Theme, data: list[Selection]) -> Figure:
    """A dot per expert: its score as a multiple of its layer's mean. With too many, a line that holds nine in ten of the layer's
    kept or removed ones, and a dot for the highest."""
    figure, (axes,) = canvas(theme, 2.9)
    is_crowded = sum(len(choice.score_E) for choice in data) > _MOST_DOTS
    least = []
    for is_kept, color, label in ((True, theme.kept, "kept"), (False, theme.removed, "removed")):
        places, by_layer = [], []
        for choice in data:
            score_E = np.array(choice.score_E) / (float(np.mean(np.abs(choice.score_E))) or 1.0)
            by_layer.append(score_E[np.isin(np.arange(len(score_E)), choice.kept) == is_kept])
            places.append(choice.layer + (-0.2 if is_kept else 0.2))
        least += np.concatenate(by_layer).tolist()
        draw = _ranges if is_crowded else _dots
        draw(axes, places, by_layer, color, label)
    if least and min(least) >= 0:  # a root scale, since most scores lie far below the largest
        axes.set_yscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes.set_ylim(0, 1.05 * max(least) or 1)
    _by_layer(axes, max(choice.layer for choice in data) + 1)
    axes.set_ylabel("score / mean of the layer")
    legend(axes, theme)
    for handle in axes.get_legend().legend_handles:
        handle.set_sizes([16])
    return figure


def _dots(axes: Axes, places: list[float], values: list[np.ndarray], color: str, label: str) -> None:
    x = np.repeat(places, [len(group) for group in values])
    axes.scatter(x, np.concatenate(values), s=14, color=color, alpha=0.75, linewidths=0, label=label)


def _ranges(axes: Axes, places: list[float], values: list[np.ndarray], color: str, label: str) -> None:
    """A line from the 5th to the 95th percentile of each group, and a dot at its maximum; groups may be empty."""
    groups = [(place, *np.percentile(group, (5, 95, 100))) for place, group in zip(places, values, strict=True) if len(group)]
    if groups:
        x, low, high, most = zip(*groups, strict=True)
        axes.vlines(x, low, high, color=color, linewidth=1.5)
        axes.scatter(x, most, s=6, color=color, linewidths=0, label=label)


def saliency(theme: Theme, data: dict[str, list]) -> Figure:
    figure, (axes,) = canvas(theme, 2.7)
    edges = [*data["scores"], 2 * data["scores"][-1] - data["scores"][-1] / 2**0.25]
    total = sum(data["kept"]) + sum(data["removed"])
    kept, removed = (np.array(data[name]) / total for name in ("kept", "removed"))
    axes.stairs(removed, edges, fill=True, color=theme.removed, alpha=0.85, label="removed")
    axes.stairs(removed + kept, edges, baseline=removed, fill=True, color=theme.kept, alpha=0.85, label="kept")
    below = np.cumsum(removed + kept)
    first, last = int((below <= 2e-3).sum()), int((below < 0.9995).sum())
    axes.set(xscale="log", xlabel="score of a weight", ylabel="share of the weights", xlim=(edges[first], edges[last + 1]))
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    legend(axes, theme)
    return figure


def sparsity(theme: Theme, data: dict[str, list[float | None]]) -> Figure:
    figure, (axes,) = canvas(theme, 2.7)
    for kind, style in zip(KINDS, _STYLES, strict=True):
        if kind in data:
            _line(axes, data[kind], theme.kind(kind), kind, linestyle=style)
    _line(axes, data["all"], theme.ink, "whole layer", linestyle="--", linewidth=1.2)
    _by_layer(axes, len(data["all"]))
    axes.set(ylabel="share removed", ylim=(0, max(0.05, 1.08 * max(v for row in data.values() for v in row if v is not None))))
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
    legend(axes, theme)
    return figure


def kurtosis(theme: Theme, data: dict[str, list[float | None]]) -> Figure:
    figure, (axes,) = canvas(theme, 2.7)
    for (stage, label), color in zip(_STAGES.items(), (theme.faint, theme.kept, theme.removed), strict=True):
        _line(axes, data[stage], color, label)
    _by_layer(axes, len(data["dense"]))
    axes.set_ylabel("kurtosis")
    legend(axes, theme)
    return figure


def layer_error(theme: Theme, data: list[float]) -> Figure:
    return _share_by_layer(theme, data, "relative squared error")


def refit(theme: Theme, data: list[float | None]) -> Figure:
    return _share_by_layer(theme, data, "share of the error before")


def _share_by_layer(theme: Theme, data: list[float | None], meaning: str) -> Figure:
    figure, (axes,) = canvas(theme, 2.4)
    _line(axes, data, theme.removed, "")
    _by_layer(axes, len(data))
    axes.set_ylabel(meaning)
    axes.set_ylim(bottom=0)
    return figure


def timeline(theme: Theme, data: dict[str, dict[str, list[float]]]) -> Figure:
    """A panel per stream: seconds as bars, or as lines for many layers; memory as a dotted line."""
    names = {"observe": "first stream", "prune": "second stream"}
    figure, panels = canvas(theme, 2.9, len(data))
    most = max(value for seconds in data.values() for phase in PHASES for value in seconds[phase]) or 1.0
    memory = max(value for seconds in data.values() for value in seconds["memory"])
    for axes, (stream, seconds) in zip(panels, data.items(), strict=True):
        layers = np.arange(len(seconds["read"]))
        for number, (phase, color) in enumerate(zip(PHASES, (theme.third, theme.kept, theme.removed), strict=True)):
            if len(layers) <= 24:
                axes.bar(layers + (number - 1) * 0.27, seconds[phase], width=0.27, color=color, label=phase)
            else:
                axes.plot(layers, seconds[phase], color=color, linewidth=1.5, label=phase)
        held = np.array(seconds["memory"]) / memory * 1.05 * most
        axes.plot(layers, held, color=theme.ink, linestyle=":", linewidth=1.4, label=f"memory, up to {memory:.2f} GiB")
        _by_layer(axes, len(layers))
        axes.set_ylim(0, 1.15 * most)
        axes.set_title(names[stream], loc="left", fontsize=9.5, color=theme.ink)
    panels[0].set_ylabel("seconds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, **legend_style(theme))
    return figure


def budget(theme: Theme, data: dict[str, list[float]]) -> Figure:
    figure, (axes,) = canvas(theme, 2.5)
    order = np.argsort(data["fraction"])
    fractions, errors = np.array(data["fraction"])[order], np.array(data["error"])[order]
    axes.plot(fractions, errors, color=theme.kept, marker="o", markersize=5, linewidth=1.8)
    by_fraction = dict(zip(data["fraction"], data["error"], strict=True))
    best = best_fraction(by_fraction)
    axes.plot(best, by_fraction[best], marker="o", markersize=12, fillstyle="none", color=theme.removed)
    where, style = (best, by_fraction[best]), {"ha": "center", "color": theme.ink, "fontsize": 9.5}
    axes.annotate(f"{best:g}", where, xytext=(0, 9), textcoords="offset points", **style)
    axes.set(xlabel="share of the removed parameters in whole experts", ylabel="held-out error", ylim=(0, 1.1 * errors.max()))
    return figure


def evaluation(theme: Theme, data: dict[str, tuple[float | None, float]]) -> Figure:
    """A row per group: the difference between the pruned and the dense model, with both numbers beside it; the pruned model's
    exact match alone if there is no dense one."""
    figure, (axes,) = canvas(theme, 0.7 + 0.26 * len(data))
    is_difference = all(dense is not None for dense, _ in data.values())
    for place, (dense, pruned) in enumerate(data.values()):
        value = pruned - dense if is_difference else pruned
        color = theme.removed if is_difference and value < 0 else theme.kept
        axes.plot([0, value], [place, place], color=color, linewidth=3, solid_capstyle="round")
        axes.plot([value], [place], marker="o", markersize=6, color=color)
        text = f"{dense:.2f} → {pruned:.2f}" if is_difference else f"{pruned:.2f}"
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", color=theme.ink, fontsize=9)
    axes.set_yticks(range(len(data)), [words(name.replace("_", " ")[:28]) for name in data])
    axes.set(ylim=(len(data) - 0.5, -0.5), xlabel="exact match" + (", pruned minus dense" if is_difference else ""))
    axes.axvline(0, color=theme.faint, linewidth=0.9)
    axes.tick_params(axis="y", labelcolor=theme.ink)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=theme.line, linewidth=0.7)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))
    return figure


def size(theme: Theme, data: dict[str, int]) -> Figure:
    figure, (axes,) = canvas(theme, 1.5)
    scale, unit = (1e9, "GB") if data["before"] >= 1e9 else (1e6, "MB")
    values = [data["before"] / scale, data["after"] / scale]
    axes.barh([0, 1], values, color=[theme.line, theme.kept], height=0.62)
    for place, value in enumerate(values):
        share = f", {values[1] / values[0] - 1:+.0%}" if place else ""
        axes.text(value, place, f" {value:,.1f} {unit}{share}", va="center", color=theme.ink, fontsize=9.5)
    axes.set_yticks([0, 1], ["before", "after"])
    axes.set(ylim=(1.5, -0.5), xlim=(0, 1.35 * max(values)))
    axes.tick_params(axis="y", labelcolor=theme.ink)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.grid(visible=False)
    return figure
