"""HTML of a page: one self-contained file without scripts, for light and dark screens of any width."""

import base64
from html import escape

_STYLE = """
:root { --paper:#fcfbf8; --ink:#23262a; --faint:#62676c; --line:#e2dfd8; --kept:#12795a; --gone:#b4471f; --tint:#f3f1ec }
@media (prefers-color-scheme: dark) {
  :root { --paper:#15171a; --ink:#e4e2dc; --faint:#9a9fa5; --line:#2d3136; --kept:#4fbf97; --gone:#ee8a68; --tint:#1d2024 }
}
* { box-sizing:border-box }
html { color-scheme:light dark; -webkit-text-size-adjust:100% }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.5 Charter,"Bitstream Charter","Sitka Text",Cambria,serif }
main { max-width:73rem; margin:0 auto; padding:2.5rem 1.25rem 4rem }
h1 { font-size:clamp(1.7rem,5vw,2.5rem); line-height:1.15; font-weight:600; letter-spacing:-.01em; margin:0;
  overflow-wrap:anywhere }
h2 { font-size:1.15rem; font-weight:600; margin:0 0 .15rem }
p { margin:0 0 .8rem; max-width:42rem }
a { color:var(--kept) }
.eyebrow, dt, th, figcaption, footer, .none { font-family:ui-sans-serif,system-ui,"Segoe UI",Roboto,sans-serif }
.eyebrow { color:var(--faint); font-size:.8rem; margin:0 0 .5rem; overflow-wrap:anywhere }
.aid { color:var(--faint); font-size:.95rem }
dl.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(9rem,1fr)); gap:1.4rem 2rem; margin:2rem 0 0;
  padding:1.4rem 0 0; border-top:2px solid var(--ink) }
.facts div { min-width:0 }
dt { color:var(--faint); font-size:.8rem }
dd { margin:0; font-size:1.75rem; line-height:1.2; font-variant-numeric:lining-nums tabular-nums }
dd small { display:block; color:var(--faint); font-size:.85rem; line-height:1.4 }
.sections { display:grid; grid-template-columns:repeat(2,minmax(0,1fr)); gap:0 3rem }
section { border-top:1px solid var(--line); padding:1.3rem 0 2rem; margin-top:1rem; min-width:0 }
section.wide { grid-column:1/-1 }
img { display:block; max-width:100%; height:auto }
figure { margin:0 }
.tiles { display:grid; grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr)); gap:1.4rem 1.2rem }
.few { grid-template-columns:repeat(auto-fill,minmax(min(13rem,45%),1fr)); gap:1.6rem 2rem }
.tiles img { width:100% }
figcaption { color:var(--faint); font-size:.78rem; padding-top:.35rem; font-variant-numeric:tabular-nums }
.scroll { overflow-x:auto }
table { border-collapse:collapse; font-size:.95rem; font-variant-numeric:lining-nums tabular-nums }
th { font-size:.78rem; font-weight:500; color:var(--faint); text-align:right; vertical-align:bottom }
td { text-align:right; white-space:nowrap }
td:first-child, table.runs td:nth-child(2), table.words td { white-space:normal; overflow-wrap:anywhere }
table.runs :nth-child(2) { text-align:left; min-width:9rem }
th, td { padding:.35rem .9rem .35rem 0; border-bottom:1px solid var(--line) }
th:first-child, td:first-child, table.words td { text-align:left }
table.words td:first-child { white-space:nowrap; vertical-align:top; color:var(--faint) }
.pair { display:grid; grid-template-columns:repeat(2,minmax(0,1fr)); gap:1rem 3rem; align-items:start }
code { font:.85em/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; overflow-wrap:anywhere }
pre { background:var(--tint); padding:.8rem 1rem; border-radius:4px; white-space:pre-wrap; margin:.3rem 0 1rem }
.none { color:var(--faint); font-size:.9rem }
.better { color:var(--kept) } .worse { color:var(--gone) }
@media (max-width:56rem) { .sections, .pair { grid-template-columns:minmax(0,1fr) } main { padding-top:1.5rem } }
footer { border-top:1px solid var(--line); margin-top:2rem; padding-top:1rem; color:var(--faint); font-size:.8rem }
"""


def page(title: str, body: str) -> str:
    """Whole document; `body` is HTML."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{escape(title)}</title>'
    )
    top = f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>'
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


def small_picture(png: bytes, alt: str, caption: str) -> str:
    return f'<figure><img src="{_uri(png)}" alt="{escape(alt)}"><figcaption>{escape(caption)}</figcaption></figure>'


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
