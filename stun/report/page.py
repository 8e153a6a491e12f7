"""Page of one run, in the run's folder `report`, beside its PNGs."""

import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from stun.checkpoint.hub import name_of
from stun.files import write_atomically
from stun.report import data, html, verdict
from stun.report.folder import RunFolder
from stun.report.form import stored_as
from stun.report.sections import SECTIONS
from stun.run.ownership import own_folder, remove_written

FOLDER, PAGE = "report", "index.html"
_PICTURES = r"experts-of-layer-\d+\.png|[a-z-]+-(light|dark)\.png"  # removed first: an earlier page may have had other layers


def write_page(run: RunFolder, comparison: Path | None = None) -> Path:
    """Write the page with all sections of the run, and a link to the page that compares it with others; returns its path."""
    folder = run.path / FOLDER
    own_folder(folder, "report")
    remove_written(folder, _PICTURES)
    sections = [section(run, folder) for section in SECTIONS]
    title = run.path.resolve().name
    back = quote(os.path.relpath(comparison, folder)) if comparison else ""
    body = f'{_header(run, title, back)}\n<div class="sections">\n{chr(10).join(filter(None, sections))}\n</div>\n{_footer(run)}'
    file = folder / PAGE
    write_atomically(file, lambda path: path.write_text(html.page(f"{title}: pruning report", body)))
    return file


def bytes_in_words(count: int) -> str:
    """Bytes with their unit, on one line."""
    scale, unit = next(((s, u) for s, u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if count >= s), (1e3, "kB"))
    return f"{count / scale:.3g}\u00a0{unit}"


def _count(number: int) -> str:
    scale, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if number >= s), (1e3, "k"))
    return f"{number / scale:.3g}{unit}"


def _header(run: RunFolder, title: str, back: str) -> str:
    summary, result, size = run.summary, run.result, data.size(run)
    dense = result.get("dense", {})
    entries = [
        ("sparsity", f"{summary['sparsity']:.1%}", f"{_count(summary['parameters'])} → {_count(summary['nonzero'])} parameters"),
        ("experts kept", f"{sum(summary['kept']):,}", f"of {sum(summary['experts']):,}"),
    ]
    if size:
        entries.append(("size on disk", bytes_in_words(size["after"]), f"from {bytes_in_words(size['before'])}"))
    form, origin = stored_as(summary)
    if form:
        entries.append(("weights stored as", form, origin))
    for name, key in (("exact match", "average"), ("perplexity", "perplexity")):
        if key in result:
            entries.append((name, f"{result[key]:.3f}", f"dense {dense[key]:.3f}" if key in dense else "dense not evaluated"))
    source = summary.get("source", "")
    what = escape(" · ".join([summary.get("model_type", ""), Path(name_of(source) or source).name, _method(run)]))
    link = f'<a href="{back}">Compared with other runs</a> · ' if back else ""
    commands = [] if dense else verdict.commands(source or "MODEL", str(run.path), run.path / "dense.json")
    return html.header(link + what, title, verdict.of_run(summary, result), commands, html.facts(entries))


def _method(run: RunFolder) -> str:
    """Short description of the pruning method."""
    sparsify, experts = run.config.get("sparsify", {}), run.experts
    chosen = "a given plan" if run.config.get("plan") else f"{experts.method.name} ({experts.score.name}, {experts.budget.name})"
    weights = " ".join(str(sparsify.get(key, "")) for key in ("method", "pattern")).strip()
    return f"experts by {chosen}, weights by {weights}"


def _footer(run: RunFolder) -> str:
    made = run.summary.get("command")
    return f"<footer>Made by{html.command(made)}</footer>" if made else ""
