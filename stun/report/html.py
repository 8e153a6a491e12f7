"""HTML of a page: one self-contained file without scripts, for light and dark screens of any width."""

import base64
import re
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


def header(eyebrow: str, title: str, verdict: str, commands: list[str], rest: str = "") -> str:
    """Top of a page: what it is of, its name, the verdict, and the commands that would make it a better one. `eyebrow` and `rest`
    are HTML."""
    lines = "".join(command(text) for text in commands)
    top = f'<p class="eyebrow">{eyebrow}</p>\n<h1>{breakable(title)}</h1>\n<p class="verdict">{breakable(verdict)}</p>'
    return f"<header>\n{top}\n{lines}{rest}\n</header>"


def breakable(text: str) -> str:
    """Text with names of runs in it, which may break between their parts, and not within a number."""
    return re.sub(r"[,/=_-](?!$)|(?<=[A-Za-z])\.(?=[A-Za-z])", r"\g<0><wbr>", escape(text))


def section(title: str, aid: str, content: str, is_wide: bool = False) -> str:
    """Part of the page: `title` and `aid` are plain text, `content` is HTML."""
    kind = ' class="wide"' if is_wide else ""
    return f'<section{kind}>\n<h2>{escape(title)}</h2>\n<p class="aid">{breakable(aid)}</p>\n{content}\n</section>'


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
    """Table, which scrolls in its own box where the window is too narrow: cells are HTML, the header is plain text. `kind` is
    numbers, words, or runs, whose first column stays in view."""
    top = f"<tr>{''.join(f'<th scope=col>{escape(cell)}</th>' for cell in header)}</tr>" if header else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table class="{kind}">{top}{body}</table></div>'


def command(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def none(text: str) -> str:
    """Text in place of a picture."""
    return f'<p class="none">{escape(text)}</p>'


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
