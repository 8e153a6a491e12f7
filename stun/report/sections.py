"""The sections of a run's page, in their order: a reading aid, and what the run has data for, or what gives it."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

from stun.report import data, draw, html
from stun.report.folder import RunFolder
from stun.report.pictures import pictures, saved
from stun.report.tables import job_command
from stun.report.tiles import tile


def _evaluate(run: RunFolder, **settings: str) -> str:
    own = {"model__path": str(run.path / "model"), "task__path": "ROWS.jsonl", **settings}
    return job_command("evaluate", **own, output=str(run.path / "result.json"))


def _drawn(
    name: str, title: str, aid: str, data_of: Callable, figure_of: Callable, missing: Callable[[RunFolder], tuple[str, str]]
) -> Callable[[RunFolder, Path], str]:
    """A section with one picture, or a line on what gives it."""

    def write(run: RunFolder, folder: Path) -> str:
        found = data_of(run)
        if not found:
            return html.section(title, aid, html.none(*missing(run)))
        return html.section(title, aid, pictures(folder, name, lambda theme: figure_of(theme, found), title))

    return write


def _selections(run: RunFolder, folder: Path) -> str:
    """A tile for each layer with experts."""
    found = data.scores(run)
    if found is None:
        return html.section("Which experts are alike", "", html.none(*_no_statistics(run)), True)
    is_ranked = not any(own.clusters for own in found)
    title = "Which experts stay" if is_ranked else "Which experts are alike"
    aid = (
        "Experts of each layer by score, the best first: green ones stay, red ones left."
        if is_ranked
        else "Strong colour is alike. The tree above a map joins alike experts; the dashed line is where this run cut it, and "
        "every green branch below it became one expert."
    )
    tiles, kind = [], "tiles few" if len(found) <= 12 else "tiles"
    for own in found:
        content = saved(tile(own), folder / f"experts-of-layer-{own.layer:03d}.png")
        caption = f"layer {own.layer} · {len(own.score_E)} → {len(own.kept)}"
        tiles.append(html.small_picture(content, f"experts of layer {own.layer}", caption))
    return html.section(title, aid, f'<div class="{kind}">{"".join(tiles)}</div>', True)


def _evaluation(run: RunFolder, folder: Path) -> str:
    title, aid = "Against the dense model", "The same questions and text, asked of both models."
    result, dense = run.result, run.result.get("dense", {})
    if not result:
        return html.section(title, aid, html.none("Not evaluated. This does it:", _evaluate(run)), True)
    rows = [
        [name, f"{dense[key]:.3f}" if key in dense else "-", f"{result[key]:.3f}"]
        for name, key in (("exact match, average", "average"), ("perplexity", "perplexity"))
        if key in result
    ]
    agreement = result.get("agreement", {})
    for name, key, form in (("divergence from dense (KL), nats a token", "kl", ".4f"), ("same first choice", "top1", ".1%")):
        if key in agreement:
            rows.append([name, "", f"{agreement[key]:{form}}"])
    for task, metrics in result.get("harness", {}).items():
        rows += [[escape(f"{task}: {name}"), "", f"{value:.3f}"] for name, value in metrics.items()]
    content, found = html.table(["", "dense", "pruned"], rows), data.evaluation(run)
    if found:
        content += pictures(folder, "evaluation", lambda theme: draw.evaluation(theme, found), title)
    return html.section(title, aid, f'<div class="pair">{content}</div>', True)


def _loads(run: RunFolder, folder: Path) -> str:
    rows = [[escape(runtime), escape(answer)] for runtime, answer in run.summary.get("loads_in", {}).items()]
    aid = "What reads model/ of this run as it is."
    return html.section("What loads it", aid, html.table([], rows, "words"), True)


def _no_statistics(run: RunFolder) -> tuple[str, str]:
    return "This run took no statistics, or they are not where they were. A run that selects experts takes them.", ""


def _no_measures(run: RunFolder) -> tuple[str, str]:
    return "This run was made before layers were measured (layers.json). Prune again to have them.", ""


def _no_single_weights(run: RunFolder) -> tuple[str, str]:
    return "No single weights left the model. With a higher target, or experts.fraction below 1, they do.", ""


def _no_errors(run: RunFolder) -> tuple[str, str]:
    return "Not measured. Evaluation beside the dense model's own result gives it:", _evaluate(run, dense="DENSE_RESULT.json")


def _no_search(run: RunFolder) -> tuple[str, str]:
    return "Not searched: experts.fraction was given. With experts.fraction=auto the split with the least error is taken.", ""


SECTIONS: list[Callable[[RunFolder, Path], str]] = [
    _evaluation,
    _drawn(
        "experts-kept",
        "Experts kept",
        "How many experts of each layer stay; with the global budget, layers whose experts are alike lose more.",
        data.experts_kept,
        draw.experts_kept,
        _no_measures,
    ),
    _drawn(
        "sparsity",
        "Sparsity by kind of tensor",
        "What share of each layer's parameters is gone, whole experts included; routers and norms are under other.",
        data.sparsity,
        draw.sparsity,
        _no_measures,
    ),
    _selections,
    _drawn(
        "usage",
        "Use of the experts by calibration source",
        "Experts in strong colour serve many of a source's tokens; a short bar is a layer that lost experts it relied on.",
        data.usage,
        draw.usage,
        _no_statistics,
    ),
    _drawn(
        "expert-scores",
        "Worth of the experts",
        "Every dot is an expert; one far above its layer's mean that left is worth a second look.",
        data.scores,
        draw.scores,
        _no_statistics,
    ),
    _drawn(
        "saliency",
        "Worth of single weights",
        "Scores by which single weights were chosen, on every sixteenth row; where both colours overlap, rows or layers differ.",
        data.saliency,
        draw.saliency,
        _no_single_weights,
    ),
    _drawn(
        "kurtosis",
        "Kurtosis of the weights",
        "Weights with long tails can lose more: removing experts should keep the kurtosis, removing small weights lowers it "
        "(STUN, section 5).",
        data.kurtosis,
        draw.kurtosis,
        _no_measures,
    ),
    _drawn(
        "layer-error",
        "Error of the layers' outputs",
        "How far hidden states are from the dense model's after each layer; a jump points at a layer that lost too much.",
        data.layer_error,
        draw.layer_error,
        _no_errors,
    ),
    _drawn(
        "budget",
        "Experts or weights",
        "Error on held-out text for each split of what leaves between whole experts and single weights; the circle was taken.",
        data.budget,
        draw.budget,
        _no_search,
    ),
    _drawn(
        "timeline",
        "Where the time went",
        "Seconds to read, compute and write each layer, which overlap; the dotted line is the memory of the rank that held most.",
        data.timeline,
        draw.timeline,
        _no_measures,
    ),
    _drawn(
        "size",
        "Size on disk",
        "Dropped experts make the files smaller; single zeros take as many bytes as what they replace.",
        data.size,
        draw.size,
        _no_measures,
    ),
    _loads,
]
