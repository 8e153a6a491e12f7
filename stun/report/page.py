"""Page of one run, in the run's folder `report`, beside its PNGs."""

import os
from collections.abc import Callable
from html import escape
from pathlib import Path
from urllib.parse import quote

from stun.checkpoint.hub import name_of
from stun.files import write_atomically
from stun.model.runtimes import in_words, served_in_words
from stun.report import charts, data, html, wording
from stun.report.folder import RunFolder
from stun.report.layer_maps import tiles
from stun.report.png import pictures
from stun.run.ownership import own_folder, remove_written

FOLDER, PAGE = "report", "index.html"
_PICTURES = r"experts-of-layer-\d+\.png|[a-z-]+-(light|dark)\.png"  # removed first: an earlier page may have had other layers


def write_page(run: RunFolder, comparison: Path | None = None) -> Path:
    """Write the page with all sections of the run, and a link to the page that compares it with others; returns its path."""
    folder = run.path / FOLDER
    own_folder(folder, "report")
    remove_written(folder, _PICTURES)
    sections = [section(run, folder) for section in _SECTIONS]
    title = run.path.resolve().name
    back = quote(os.path.relpath(comparison, folder)) if comparison else ""
    made = run.summary.get("command")
    footer = f"<footer>Made by{html.command(made)}</footer>" if made else ""
    body = f'{_header(run, title, back)}\n<div class="sections">\n{chr(10).join(filter(None, sections))}\n</div>\n{footer}'
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
    form, origin = wording.stored_as(summary)
    if form:
        entries.append(("weights stored as", form, origin))
    for name, key in (("exact match", "average"), ("perplexity", "perplexity")):
        if key in result:
            entries.append((name, f"{result[key]:.3f}", f"dense {dense[key]:.3f}" if key in dense else "dense not evaluated"))
    source = summary.get("source", "")
    what = escape(" · ".join([summary.get("model_type", ""), Path(name_of(source) or source).name, _method(run)]))
    link = f'<a href="{back}">Compared with other runs</a> · ' if back else ""
    commands = [] if dense else wording.commands(source or "MODEL", str(run.path), run.path / "dense.json")
    return html.header(link + what, title, wording.of_run(summary, result), commands, html.facts(entries))


def _method(run: RunFolder) -> str:
    """Short description of the pruning method."""
    sparsify, experts = run.config.get("sparsify", {}), run.experts
    chosen = "a given plan" if run.config.get("plan") else f"{experts.method.name} ({experts.score.name}, {experts.budget.name})"
    weights = " ".join(str(sparsify.get(key, "")) for key in ("method", "pattern")).strip()
    return f"experts by {chosen}, weights by {weights}"


def _drawn(name: str, title: str, data_of: Callable, figure_of: Callable, missing: str) -> Callable[[RunFolder, Path], str]:
    """Section with one picture, or a line on why its data are missing and what gives them."""

    def write(run: RunFolder, folder: Path) -> str:
        values, aid = data_of(run), _AIDS[name]
        if not values:
            return html.section(title, aid, html.none(missing))
        return html.section(title, aid, pictures(folder, name, lambda theme: figure_of(theme, values), title))

    return write


def _selections(run: RunFolder, folder: Path) -> str:
    """Section with a tile per layer with experts."""
    selections = data.scores(run)
    if selections is None:
        return html.section("Which experts are alike", "", html.none(_NO_STATISTICS), True)
    is_ranked = not any(selection.clusters for selection in selections)
    title = "Which experts are kept" if is_ranked else "Which experts are alike"
    aid = (
        "Experts of each layer by score, the best first: green ones are kept, red ones removed."
        if is_ranked
        else "Strong colour is alike. The tree above a map joins alike experts; the dashed line is where this run cut it, and "
        "every green branch below it became one expert."
    )
    return html.section(title, f"{aid} Each can be enlarged.", tiles(selections, folder), True)


def _evaluation(run: RunFolder, folder: Path) -> str:
    title, aid = "Against the dense model", "The same questions and text, asked of both models."
    result, dense = run.result, run.result.get("dense", {})
    if not result:
        return ""  # the verdict says so
    rows = []
    for name, key in (("exact match, average", "average"), ("perplexity", "perplexity")):
        if key in result:
            beside = (f"{dense[key]:.3f}", f"{result[key] - dense[key]:+.3f}") if key in dense else ("-", "-")
            rows.append([name, beside[0], f"{result[key]:.3f}", beside[1]])
    agreement = result.get("agreement", {})
    for name, key, form in (("divergence from dense (KL), nats a token", "kl", ".4f"), ("same first choice", "top1", ".1%")):
        if key in agreement:
            rows.append([name, "", f"{agreement[key]:{form}}", ""])
    for task, metrics in result.get("harness", {}).items():
        rows += [[escape(f"{task}: {name}"), "", f"{value:.3f}", ""] for name, value in metrics.items()]
    content, by_group = html.table(["", "dense", "pruned", "difference"], rows), data.evaluation(run)
    if by_group:
        content += pictures(folder, "evaluation", lambda theme: charts.evaluation(theme, by_group), title)
    return html.section(title, aid, f'<div class="pair">{content}</div>', True)


def _loads(run: RunFolder, folder: Path) -> str:
    answers = in_words(run.summary.get("loads_in", {})) | served_in_words(run.served)
    rows = [[escape(runtime), html.breakable(answer)] for runtime, answer in answers.items()]
    aid = "Runtimes that read model/ of this run as it is."
    return html.section("What loads it", aid, html.table([], rows, "words"), True)


_NO_STATISTICS = "This run took no statistics, or they are not where they were. A run that selects experts takes them."
_NO_MEASURES = "This run was made before layers were measured (layers.json). Prune again to have them."
_NO_SINGLE_WEIGHTS = "No single weights were removed. With a higher target, or experts.fraction below 1, they are."
_NO_ERRORS = "Not measured. Evaluation with dense=, the dense model's own result, measures it."
_NO_REFIT = "Experts were not refitted. With experts.refit=true, those that are kept make up for what was removed."
_NO_SEARCH = "Not searched: experts.fraction was given. With experts.fraction=auto several splits are tried."
_AIDS = {  # text below a section's title, by the name of its picture
    "experts-kept": "Experts of each layer; with the global budget, more are removed from layers whose experts are alike.",
    "sparsity": "Share of each layer's parameters removed, whole experts included; routers and norms are under other.",
    "usage": "Experts in strong colour serve many of a source's tokens; a short bar is a layer that lacks experts it relied on.",
    "expert-scores": "Every dot is an expert; a removed one far above its layer's mean is worth a second look. In large models a "
    "dot is the highest of a layer's kept or removed experts, and a line holds nine in ten of them.",
    "saliency": "Scores by which single weights were chosen, on every sixteenth row; where both colours overlap, rows or layers "
    "differ.",
    "kurtosis": "Weights with long tails can be pruned more: removing experts should keep the kurtosis, removing small weights "
    "lowers it (STUN, section\u00a05).",
    "layer-error": "How far hidden states are from the dense model's after each layer; a jump points at a layer pruned too much.",
    "refit": "Squared error of each layer's output once its kept experts were fitted together, as a share of that before.",
    "budget": "Held-out error for each split of the removed parameters into whole experts and single weights; the circle was "
    "taken: of those within 15\u00a0% of the least error the one with most experts, since fewer make a smaller model.",
    "timeline": "Seconds to read, compute and write each layer, which overlap; the dotted line is the memory of the rank that "
    "held most.",
    "size": "Removed experts make the files smaller; single zeros take as many bytes as what they replace.",
}
_SECTIONS: list[Callable[[RunFolder, Path], str]] = [
    _evaluation,
    _drawn("experts-kept", "Experts kept", data.experts_kept, charts.experts_kept, _NO_MEASURES),
    _drawn("sparsity", "Sparsity by kind of tensor", data.sparsity, charts.sparsity, _NO_MEASURES),
    _selections,
    _drawn("usage", "Use of the experts by calibration source", data.usage, charts.usage, _NO_STATISTICS),
    _drawn("expert-scores", "Worth of the experts", data.scores, charts.scores, _NO_STATISTICS),
    _drawn("saliency", "Worth of single weights", data.saliency, charts.saliency, _NO_SINGLE_WEIGHTS),
    _drawn("kurtosis", "Kurtosis of the weights", data.kurtosis, charts.kurtosis, _NO_MEASURES),
    _drawn("layer-error", "Error of the layers' outputs", data.layer_error, charts.layer_error, _NO_ERRORS),
    _drawn("refit", "Error after the joint refit", data.refit, charts.refit, _NO_REFIT),
    _drawn("budget", "Experts or weights", data.budget, charts.budget, _NO_SEARCH),
    _drawn("timeline", "Where the time went", data.timeline, charts.timeline, _NO_MEASURES),
    _drawn("size", "Size on disk", data.size, charts.size, _NO_MEASURES),
    _loads,
]
