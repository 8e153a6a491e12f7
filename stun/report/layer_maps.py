"""Experts of one layer as HTML, for light and dark pages: a tree above a map of their distances, or their scores in order."""

from pathlib import Path

import numpy as np

from stun.report import html
from stun.report.data import Selection
from stun.report.png import saved_map, shaded
from stun.report.theme import EITHER_KEPT

_MOST = 160  # rows of a map on the page; with more experts, neighbours are averaged
_X, _Y = 4, 200  # units of a drawing: a column is 4 wide, the whole 200 high


def tiles(selections: list[Selection], folder: Path) -> str:
    """Small drawings of the layers, each of which can be enlarged; maps are also saved in `folder`."""
    numbers = [selection.layer for selection in selections]
    neighbours = zip([None, *numbers[:-1]], [*numbers[1:], None], strict=True)
    drawn = "".join(_tile(selection, folder, *pair) for selection, pair in zip(selections, neighbours, strict=True))
    return f'<div class="{"tiles few" if len(selections) <= 12 else "tiles"}">{drawn}</div>'


def _tile(selection: Selection, folder: Path, before: int | None, after: int | None) -> str:
    caption = f"layer {selection.layer} · {len(selection.score_E)}\u00a0→\u00a0{len(selection.kept)}"
    drawing, details = _clustered(selection, folder) if selection.clusters else _ranked(selection)
    links = {f"layer {number}": number for number in (before, after) if number is not None}
    return html.enlargeable(selection.layer, min(len(selection.score_E), _MOST), drawing, caption, details, links)


def branches(selection: Selection) -> list[tuple[np.ndarray, bool]]:
    """Brackets [4, 2] of the tree (x in experts, y the distance of a merge), and whether the run made that merge."""
    cluster_of = {expert: number for number, cluster in enumerate(selection.clusters) for expert in cluster}
    low = min((merge.distance for merge in selection.merges), default=0.0)
    position = {expert: (place, min(0.0, low)) for place, expert in enumerate(selection.order)}
    members = {expert: [expert] for expert in position}
    brackets = []
    for merge in selection.merges:
        (x, y), (u, v) = position[merge.first], position[merge.second]
        first, second = members[merge.first], members[merge.second]
        first += second
        members |= dict.fromkeys(second, first)
        position |= dict.fromkeys(first, ((x + u) / 2, merge.distance))
        bracket = np.array([(x, y), (x, merge.distance), (u, merge.distance), (u, v)])
        brackets.append((bracket, len({cluster_of.get(expert, -1 - expert) for expert in first}) == 1))
    return brackets


def cut(selection: Selection) -> float | None:
    """Height between the merges that the run made and those it did not; None if no height separates them."""
    heights = [(bracket[1, 1], is_made) for bracket, is_made in branches(selection)]
    made, not_made = ([height for height, is_made in heights if is_made is wanted] for wanted in (True, False))
    if not made or not not_made or max(made) > min(not_made):
        return None
    return (max(made) + min(not_made)) / 2


def near(selection: Selection) -> tuple[np.ndarray, float, float]:
    """Map [E, E] in the order of the tree, from 1 for the nearest experts to 0, and the distances that are drawn as 1 and as 0.
    The farthest quarter of the pairs is 0, so that the others differ."""
    distance_EE = selection.distance_EE[np.ix_(selection.order, selection.order)]
    pairs = distance_EE[~np.eye(len(distance_EE), dtype=bool)]
    low, high = np.percentile(pairs, (0, 75)).tolist() if pairs.size else (0.0, 1.0)
    near_EE = np.clip((high - distance_EE) / ((high - low) or 1.0), 0, 1)
    np.fill_diagonal(near_EE, 1)
    return near_EE, low, high


def _averaged(near_EE: np.ndarray) -> tuple[np.ndarray, int]:
    """Map of at most `_MOST` rows, and how many experts share one; the last few may be left out."""
    step = -(-len(near_EE) // _MOST)
    whole = len(near_EE) // step * step
    return near_EE[:whole, :whole].reshape(whole // step, step, whole // step, step).mean((1, 3)), step


def _clustered(selection: Selection, folder: Path) -> tuple[str, tuple[str, str]]:
    """Tree and map; and, for the enlarged view, their scale and the experts in their order."""
    near_EE, low, high = near(selection)
    small, step = _averaged(near_EE)
    file = folder / f"experts-of-layer-{selection.layer:03d}.png"
    saved_map(near_EE, EITHER_KEPT, file)
    drawing = _tree(selection) + html.map_picture(shaded(small, EITHER_KEPT), f"experts of layer {selection.layer}")
    scale = html.scale("Distance of two experts:", f"{low:.3g}", f"{high:.3g} or more")
    means = f'A square is the mean of {step} by {step} pairs; <a href="{file.name}">all pairs</a>.' if step > 1 else ""
    aid = "Experts in the order of the map. Those in brackets became one, the one in bold."
    return drawing, (scale, f'<p class="aid">{aid} {means}</p>{_experts(selection)}')


def _ranked(selection: Selection) -> tuple[str, tuple[str, str]]:
    """Bars of the scores; and, for the enlarged view, their range and the experts in their order."""
    scale = f"Bars from the least score, {min(selection.score_E):.3g}, to the highest, {max(selection.score_E):.3g}."
    return _ranking(selection), (scale, f'<p class="aid">Experts by score. Those in bold are kept.</p>{_experts(selection)}')


def _experts(selection: Selection) -> str:
    """Experts in the order of the drawing, kept ones in bold, clusters of several in brackets."""
    kept, place = set(selection.kept), {expert: number for number, expert in enumerate(selection.order)}
    clusters = selection.clusters or [[expert] for expert in _by_score(selection)]
    rest = set(place) - {expert for cluster in clusters for expert in cluster}
    groups = [sorted(cluster, key=place.__getitem__) for cluster in [*clusters, *([expert] for expert in sorted(rest))]]
    if selection.clusters:
        groups.sort(key=lambda group: place[group[0]])
    words = [" ".join(f"<b>{e}</b>" if e in kept else str(e) for e in group) for group in groups]
    return f'<p class="experts">{" ".join(f"[{w}]" if len(g) > 1 else w for w, g in zip(words, groups, strict=True))}</p>'


def _by_score(selection: Selection) -> list[int]:
    return sorted(range(len(selection.score_E)), key=lambda expert: -selection.score_E[expert])


def _tree(selection: Selection) -> str:
    brackets, height = branches(selection), cut(selection)
    heights = [float(y) for bracket, _ in brackets for y in bracket[:, 1]] or [0.0, 1.0]
    low, high = min(heights), max(heights) + 0.05 * (max(heights) - min(heights) or 1)

    def y(value: float) -> int:
        return round(_Y * (high - value) / (high - low))

    def path(bracket: np.ndarray) -> str:
        (x, foot), (_, top), (u, _), (_, other) = bracket.tolist()
        return f"M{round(_X * (x + 0.5))} {y(foot)}V{y(top)}H{round(_X * (u + 0.5))}V{y(other)}"

    paths = {"apart": "", "merged": ""}
    for bracket, is_made in brackets:
        paths["merged" if is_made else "apart"] += path(bracket)
    if height is not None:
        paths["cut"] = f"M0 {y(height)}H{_X * len(selection.score_E)}"
    return html.drawing("tree", _X * len(selection.score_E), _Y, paths)


def _ranking(selection: Selection) -> str:
    """Bars of the scores in descending order, above the least of them: scores may all be alike, or below zero."""
    low, high = min(selection.score_E), max(selection.score_E)
    bars: dict[str, list[str]] = {"kept": [], "removed": []}
    for place, expert in enumerate(_by_score(selection)):
        top = min(_Y - 2, round(_Y * (high - selection.score_E[expert]) / ((high - low) or 1.0)))  # the least is seen too
        bars["kept" if expert in selection.kept else "removed"].append(f"M{_X * place} {_Y}V{top}h{_X - 1}V{_Y}")
    return html.drawing("bars", _X * len(selection.score_E), _Y, {kind: "".join(paths) for kind, paths in bars.items()})
