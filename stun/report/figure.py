"""Pictures: exact match against total sparsity, and the error of every split of a target."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from stun.config import StunError
from stun.files import load_json

matplotlib.use("Agg")
COLORS = {"STUN": "#0b6e4f", "experts only": "#c8553d", "weights only": "#3a5a98"}


def comparison_figure(comparisons: list[str], output: str) -> None:
    """Draw the averages in the `comparison.json` files of several targets into a PNG at `output`. Raises StunError."""
    lines: dict[str, list[tuple[float, float]]] = {}
    dense = None
    for file in comparisons:
        try:
            results = load_json(Path(file))
            dense = results.pop("dense")["average"]
            for name, result in results.items():
                lines.setdefault(name, []).append((result["prune"]["target"], result["average"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise StunError(f"comparisons: {file} is not a comparison.json: {error!r}") from error
    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    if dense is not None:
        axes.axhline(dense, color="#888888", linestyle="--", linewidth=1)
        axes.annotate(f"dense {dense:.3f}", (0.01, dense), xycoords=("axes fraction", "data"), va="bottom", color="#555555")
    for name, points in lines.items():
        targets, averages = zip(*sorted(points), strict=True)
        axes.plot(targets, averages, marker="o", color=COLORS.get(name), label=name)
    axes.set(xlabel="total sparsity of the decoder layers", ylabel="exact match, average of the tasks", ylim=(0, 1.06))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def curve_figure(error: dict[str, float], output: Path) -> None:
    """Draw held-out error against the share of the removed parameters that leaves as whole experts, into a PNG."""
    fractions, errors = [float(fraction) for fraction in error], list(error.values())
    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.plot(fractions, errors, marker="o", color=COLORS["STUN"])
    best = min(range(len(errors)), key=errors.__getitem__)
    axes.plot(fractions[best], errors[best], marker="o", markersize=11, fillstyle="none", color=COLORS["experts only"])
    axes.annotate(
        f"chosen: {fractions[best]}", (fractions[best], errors[best]), xytext=(0, -20), textcoords="offset points", ha="center"
    )
    axes.set(
        xlabel="share of the removed parameters that leaves as whole experts", ylabel="held-out error of the layers' outputs"
    )
    axes.set_ylim(bottom=0, top=1.1 * max(errors))
    axes.grid(alpha=0.25)
    figure.savefig(output)
