"""Small picture of one layer's experts, for light and dark pages: similar and merged experts, or experts by score."""

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from stun.report.data import Selection
from stun.report.theme import EITHER_FAINT, EITHER_KEPT, EITHER_REMOVED

_MOST = 160  # rows of a map; with more experts, neighbours are averaged
_NEAR = LinearSegmentedColormap.from_list("near", [to_rgba(EITHER_KEPT), (*to_rgba(EITHER_KEPT)[:3], 0.0)])


def tile(selection: Selection) -> Figure:
    """Tree and map of the distances, or sorted scores if experts were ranked."""
    figure = Figure(figsize=(2.0, 2.5 if selection.clusters else 1.4), dpi=180)
    figure.patch.set_alpha(0)
    if selection.clusters:
        _tree(figure.add_axes((0.01, 0.79, 0.98, 0.2)), selection)
        _map(figure.add_axes((0.01, 0.01, 0.98, 0.775)), selection)
    else:
        _ranking(figure.add_axes((0.01, 0.02, 0.98, 0.96)), selection)
    return figure


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


def _tree(axes, selection: Selection) -> None:
    brackets, height = branches(selection), cut(selection)
    colors = [EITHER_KEPT if is_made else EITHER_FAINT for _, is_made in brackets]
    width = 1.1 if len(selection.score_E) <= 64 else 0.6
    axes.add_collection(LineCollection([bracket for bracket, _ in brackets], colors=colors, linewidths=width))
    axes.set_xlim(-0.5, len(selection.score_E) - 0.5)
    heights = [float(y) for bracket, _ in brackets for y in bracket[:, 1]] or [0.0, 1.0]
    axes.set_ylim(min(heights), max(heights) + 0.05 * (max(heights) - min(heights) or 1))
    if height is not None:
        axes.axhline(height, color=EITHER_REMOVED, linewidth=0.9, linestyle=(0, (3, 2)))
    axes.axis("off")


def _map(axes, selection: Selection) -> None:
    near_EE = selection.distance_EE[np.ix_(selection.order, selection.order)].copy()
    off = near_EE[~np.eye(len(near_EE), dtype=bool)]
    np.fill_diagonal(near_EE, off.min() if off.size else 0)
    step = -(-len(near_EE) // _MOST)
    whole = len(near_EE) // step * step
    small = near_EE[:whole, :whole].reshape(whole // step, step, whole // step, step).mean((1, 3))
    low, high = np.percentile(off, (0, 75)) if off.size else (0.0, 1.0)
    axes.imshow(small, cmap=_NEAR, vmin=low, vmax=high, interpolation="nearest", aspect="auto")
    axes.axis("off")


def _ranking(axes, selection: Selection) -> None:
    order = sorted(range(len(selection.score_E)), key=lambda expert: -selection.score_E[expert])
    colors = [EITHER_KEPT if expert in set(selection.kept) else EITHER_REMOVED for expert in order]
    axes.bar(range(len(order)), [selection.score_E[expert] for expert in order], width=0.86, color=colors)
    axes.axis("off")
