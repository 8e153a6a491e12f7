"""Pictures, saved as PNGs and embedded in a page."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from stun.files import write_atomically
from stun.report import html
from stun.report.theme import THEMES, Theme

_COLORS = 64  # a chart has a few, and their blends with the background
_SHADES = 32  # of a map
_SIDE = 512  # pixels of a map that is viewed alone, about


def pictures(folder: Path, name: str, figure_of: Callable[[Theme], Figure], alt: str) -> str:
    """HTML of a picture in every theme, saved as `name`-THEME.png."""
    first, *others = [figure_of(theme) for theme in THEMES]
    contents = [saved(first, folder / f"{name}-{THEMES[0].name}.png")]
    for figure, theme in zip(others, THEMES[1:], strict=True):
        _lay_out_like(first, figure)
        contents.append(saved(figure, folder / f"{name}-{theme.name}.png"))
    return html.picture(*contents, alt)


def _lay_out_like(drawn: Figure, figure: Figure) -> None:
    """Themes differ in colours alone: where panels go, a third of the time of drawing, is found once."""
    figure.set_layout_engine("none")
    for panel, like in zip(figure.axes, drawn.axes, strict=True):
        panel.set_position(like.get_position(original=True))


def saved(figure: Figure, file: Path) -> bytes:
    """Content of a figure's PNG, also written to `file`. A palette makes it three times smaller."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).quantize(_COLORS, Image.Quantize.FASTOCTREE)
    return _written(_png(image, optimize=True), file)


def shaded(strength_HW: np.ndarray, color: str, zoom: int = 1) -> bytes:
    """PNG of a map between 0, clear, and 1, opaque, in one colour, with squares of `zoom` pixels."""
    shades_HW = np.rint(strength_HW * (_SHADES - 1)).astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)
    image = Image.fromarray(shades_HW)
    image.putpalette(bytes.fromhex(color.removeprefix("#")) * _SHADES)
    return _png(image, transparency=bytes(np.linspace(0, 255, _SHADES).astype(np.uint8)))


def saved_map(strength_HW: np.ndarray, color: str, file: Path) -> bytes:
    """Content of the map's PNG, also written to `file`, large enough to be viewed alone."""
    return _written(shaded(strength_HW, color, max(1, _SIDE // len(strength_HW))), file)


def _png(image: Image.Image, **settings) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", **settings)
    return content.getvalue()


def _written(content: bytes, file: Path) -> bytes:
    write_atomically(file, lambda path: path.write_bytes(content))
    return content
