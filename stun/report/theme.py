"""Colours and sizes of a report's pictures, for light and dark pages."""

from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")
WIDTH, DPI = 4.7, 200  # inches; a picture is as wide as a phone, or half a screen


@dataclass(frozen=True)
class Theme:
    """`ink` for words, `line` for axes and grids; `kept`, `removed`, `third` to `fifth` for data."""

    name: str
    paper: str
    ink: str
    faint: str
    line: str
    kept: str
    removed: str
    third: str
    fourth: str
    fifth: str

    @property
    def colors(self) -> list[str]:
        """Colours of lines that have no fixed one, in order."""
        return [self.kept, self.third, self.removed, self.fourth, self.fifth, self.faint]

    def kind(self, name: str) -> str:
        """Colour of a kind of tensor, the same in every picture."""
        return _KINDS[name][self.name == "dark"]


# Kind of tensor -> its colour on light and on dark pages.
_KINDS = {
    "experts": ("#3a5f9e", "#8db0ec"),
    "shared": ("#1f8299", "#6cc5da"),
    "mlp": ("#a07410", "#d9b45a"),
    "attention": ("#8b4a9c", "#cd9fe0"),
    "other": ("#6b7075", "#9a9fa5"),
}
LIGHT = Theme("light", "#fcfbf8", "#23262a", "#6b7075", "#d9d6cf", "#12795a", "#c2512f", "#3a5f9e", "#a07410", "#8b4a9c")
DARK = Theme("dark", "#15171a", "#e4e2dc", "#9a9fa5", "#3a3e44", "#4fbf97", "#ee8a68", "#8db0ec", "#d9b45a", "#cd9fe0")
THEMES = (LIGHT, DARK)
EITHER_KEPT = "#1f9a74"  # readable on both kinds of page


def canvas(theme: Theme, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Figure with a transparent background and `columns` panels side by side."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for panel in axes:
        _plain(panel, theme)
    return figure, list(axes)


def _plain(axes: Axes, theme: Theme) -> None:
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.line)
    axes.tick_params(colors=theme.faint, labelsize=9, length=3, width=0.8)
    axes.xaxis.label.set(color=theme.faint, fontsize=9.5)
    axes.yaxis.label.set(color=theme.faint, fontsize=9.5)
    axes.grid(axis="y", color=theme.line, linewidth=0.7)
    axes.set_axisbelow(True)


def words(text: str) -> str:
    """Text for matplotlib, with dollars escaped, which would start a formula."""
    return text.replace("$", r"\$")


def legend_style(theme: Theme) -> dict:
    """Settings of every legend."""
    return {"frameon": False, "fontsize": 9, "labelcolor": theme.ink, "handlelength": 1.3, "columnspacing": 1.2}


def legend(axes: Axes, theme: Theme) -> None:
    """Legend above the panel."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, borderaxespad=0.2, **legend_style(theme))
