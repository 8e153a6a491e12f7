"""HTML of a page: one self-contained file without scripts, for light and dark screens of any width."""

import base64
from html import escape

from stun.report.style import STYLE


def page(title: str, body: str) -> str:
    """Whole document; `body` is HTML."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{escape(title)}</title>'
    )
    top = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>'
    return f"{top}\n<body><main>\n{body}\n</main></body></html>\n"


def section(title: str, aid: str, content: str, is_wide: bool = False) -> str:
    """Part of the page: `title` and `aid` are plain text, `content` is HTML."""
    kind = ' class="wide"' if is_wide else ""
    return f'<section{kind}>\n<h2>{escape(title)}</h2>\n<p class="aid">{escape(aid)}</p>\n{content}\n</section>'


def picture(light: bytes, dark: bytes, alt: str) -> str:
    """Picture from two PNGs, one for light and one for dark screens."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_uri(dark)}">'
        f'<img src="{_uri(light)}" alt="{escape(alt)}"></picture>'
    )


def map_picture(png: bytes, alt: str) -> str:
    return f'<img class="map" src="{_uri(png)}" alt="{escape(alt)}">'


def drawing(kind: str, width: int, height: int, paths: dict[str, str]) -> str:
    """Drawing that fills its place, from the data of SVG paths by class."""
    lines = "".join(f'<path class="{name}" d="{data}"/>' for name, data in paths.items() if data)
    box = f'viewBox="0 0 {width} {height}" preserveAspectRatio="none"'
    return f'<svg class="{kind}" {box} aria-hidden="true">{lines}</svg>'


def scale(meaning: str, first: str, last: str) -> str:
    """Scale of a map, from strong to clear."""
    return f"{escape(meaning)}<br>{escape(first)}<i></i>{escape(last)}"


def enlargeable(number: int, columns: int, content: str, caption: str, details: tuple[str, str], links: dict[str, int]) -> str:
    """Drawing number `number` of several, which fills the window once its link is followed, with a scale and a text, `details`,
    and `links` to others. Its `columns` are then at least 5 pixels wide."""
    others = "".join(f'<a href="#map-{other}">{escape(word)}</a>' for word, other in links.items())
    bar = f'<p class="bar">{others}<a href="#tile-{number}">close</a></p>'
    scale_and_text = f'<p class="scale">{details[0]}</p><div class="details">{details[1]}</div>'
    link = f'<a class="open" href="#map-{number}">{content}</a>'  # to itself, which enlarges it: the page does without scripts
    text = f"<figcaption>{escape(caption)}</figcaption>{scale_and_text}"
    return f'<div id="tile-{number}"><figure id="map-{number}" style="--least:{5 * columns}px">{bar}{link}{text}</figure></div>'


def facts(entries: list[tuple[str, str, str]]) -> str:
    """List of (name, large value, small remark)."""
    cells = (f"<div><dt>{escape(n)}</dt><dd>{escape(v)}<small>{escape(r)}</small></dd></div>" for n, v, r in entries)
    return f'<dl class="facts">{"".join(cells)}</dl>'


def table(header: list[str], rows: list[list[str]], kind: str = "numbers") -> str:
    """Table: cells are HTML, the header is plain text. `kind` is numbers, words, or runs (with names in the second column)."""
    top = f"<tr>{''.join(f'<th scope=col>{escape(cell)}</th>' for cell in header)}</tr>" if header else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{top}{body}</table></div>'


def command(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def none(text: str, remedy: str = "") -> str:
    """Text in place of a picture: why there is none, and the command `remedy` that makes it."""
    return f'<p class="none">{escape(text)}</p>{command(remedy) if remedy else ""}'


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
