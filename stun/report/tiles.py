"""A small picture of one layer's experts, the same for light and dark pages: who is alike and merged, or who is worth most."""

from __future__ import annotations

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from stun.report.data import Selection
from stun.report.theme import EITHER_FAINT, EITHER_GONE, EITHER_KEPT

_MOST = 160  # rows of a map; of more experts, neighbours are averaged
_NEAR = LinearSegmentedColormap.from_list("near", [to_rgba(EITHER_KEPT), (*to_rgba(EITHER_KEPT)[:3], 0.0)])


def tile(own: Selection) -> Figure:
    """Tree and map of the distances, or the scores in order where experts were ranked."""
    figure = Figure(figsize=(2.0, 2.5 if own.clusters else 1.4), dpi=180)
    figure.patch.set_alpha(0)
    if own.clusters:
        _tree(figure.add_axes((0.01, 0.79, 0.98, 0.2)), own)
        _map(figure.add_axes((0.01, 0.01, 0.98, 0.775)), own)
    else:
        _ranking(figure.add_axes((0.01, 0.02, 0.98, 0.96)), own)
    return figure


def branches(own: Selection) -> list[tuple[np.ndarray, bool]]:
    """The tree's brackets [4, 2] (x in experts, y the distance of a merge), and whether the run made that merge."""
    home = {expert: number for number, cluster in enumerate(own.clusters) for expert in cluster}
    low = min((merge.distance for merge in own.merges), default=0.0)
    at = {expert: (place, min(0.0, low)) for place, expert in enumerate(own.order)}
    members = {expert: [expert] for expert in at}
    found = []
    for merge in own.merges:
        (x, y), (u, v) = at[merge.first], at[merge.second]
        one, two = members[merge.first], members[merge.second]
        one += two
        members |= dict.fromkeys(two, one)
        at |= dict.fromkeys(one, ((x + u) / 2, merge.distance))
        bracket = np.array([(x, y), (x, merge.distance), (u, merge.distance), (u, v)])
        found.append((bracket, len({home.get(expert, -1 - expert) for expert in one}) == 1))
    return found


def cut(own: Selection) -> float | None:
    """The height between the merges that were made and those that were not; None where no height divides them."""
    heights = [(bracket[1, 1], is_made) for bracket, is_made in branches(own)]
    made, others = ([height for height, is_made in heights if is_made is wanted] for wanted in (True, False))
    if not made or not others or max(made) > min(others):
        return None
    return (max(made) + min(others)) / 2


def _tree(axes, own: Selection) -> None:
    found, height = branches(own), cut(own)
    colors = [EITHER_KEPT if is_made else EITHER_FAINT for _, is_made in found]
    width = 1.1 if len(own.score_E) <= 64 else 0.6
    axes.add_collection(LineCollection([bracket for bracket, _ in found], colors=colors, linewidths=width))
    axes.set_xlim(-0.5, len(own.score_E) - 0.5)
    heights = [float(y) for bracket, _ in found for y in bracket[:, 1]] or [0.0, 1.0]
    axes.set_ylim(min(heights), max(heights) + 0.05 * (max(heights) - min(heights) or 1))
    if height is not None:
        axes.axhline(height, color=EITHER_GONE, linewidth=0.9, linestyle=(0, (3, 2)))
    axes.axis("off")


def _map(axes, own: Selection) -> None:
    near_EE = own.distance_EE[np.ix_(own.order, own.order)].copy()
    off = near_EE[~np.eye(len(near_EE), dtype=bool)]
    np.fill_diagonal(near_EE, off.min() if off.size else 0)
    step = -(-len(near_EE) // _MOST)
    whole = len(near_EE) // step * step
    small = near_EE[:whole, :whole].reshape(whole // step, step, whole // step, step).mean((1, 3))
    low, high = np.percentile(off, (0, 75)) if off.size else (0.0, 1.0)
    axes.imshow(small, cmap=_NEAR, vmin=low, vmax=high, interpolation="nearest", aspect="auto")
    axes.axis("off")


def _ranking(axes, own: Selection) -> None:
    order = sorted(range(len(own.score_E)), key=lambda expert: -own.score_E[expert])
    colors = [EITHER_KEPT if expert in set(own.kept) else EITHER_GONE for expert in order]
    axes.bar(range(len(order)), [own.score_E[expert] for expert in order], width=0.86, color=colors)
    axes.axis("off")
