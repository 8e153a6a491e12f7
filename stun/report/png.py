"""Pictures, saved as PNGs and embedded in a page."""

import io
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from stun.files import write_atomically
from stun.report import html
from stun.report.theme import THEMES, Theme


def pictures(folder: Path, name: str, figure_of: Callable[[Theme], Figure], alt: str) -> str:
    """HTML of a picture in every theme, saved as `name`-THEME.png."""
    return html.picture(*(saved(figure_of(theme), folder / f"{name}-{theme.name}.png") for theme in THEMES), alt)


def saved(figure: Figure, file: Path) -> bytes:
    """Content of a figure's PNG, also written to `file`."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(file, lambda path: path.write_bytes(content.getvalue()))
    return content.getvalue()
