"""Pictures on disk and on a page."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from stun.files import write_atomically
from stun.report import html
from stun.report.theme import THEMES, Theme


def pictures(folder: Path, name: str, figure_of: Callable[[Theme], Figure], alt: str) -> str:
    """A picture of that name in every theme, on disk and as HTML."""
    return html.picture(*(saved(figure_of(theme), folder / f"{name}-{theme.name}.png") for theme in THEMES), alt)


def saved(figure: Figure, file: Path) -> bytes:
    """The content of a PNG, which is written to `file` too."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(file, lambda path: path.write_bytes(content.getvalue()))
    return content.getvalue()
