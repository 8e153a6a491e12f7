"""Use of the experts by the calibration text: a choice by what they do on it is as good as the text is like the model's use."""

import torch

from stun.model.architecture import Architecture
from stun.statistics.store import Statistics

RARE = 0.1  # of an even share of a layer's routed tokens; who gets less is rarely seen
_MANY = 0.1  # share of all experts: more of them rarely seen begin a run with a warning


def warning(arch: Architecture, stats: Statistics) -> str:
    """Line about experts that the calibration text rarely reaches, and which of its sources would; empty if they are few."""
    sources, experts, unseen, rare = stats.sources, 0, 0, 0
    reached = dict.fromkeys(sources, 0)
    for layout in (layout for layout in arch.layers if layout.experts):
        served_SE = stats.load(layout.index, layout.num_experts)["coactivation"].diagonal(dim1=1, dim2=2).double()
        rare_E = _is_rare(served_SE.sum(0))
        experts, unseen, rare = experts + len(rare_E), unseen + int((served_SE.sum(0) == 0).sum()), rare + int(rare_E.sum())
        for name, served_E in zip(sources, served_SE, strict=True):
            reached[name] += int((rare_E & ~_is_rare(served_E)).sum())
    if rare <= _MANY * experts:
        return ""
    helps = [f"{name} reaches {count} of them" for name, count in reached.items() if count]
    more = f"raise the weight of its sources ({', '.join(helps)})" if helps else "add text of other kinds (calibration.mixture)"
    counts = f"{rare} of {experts} experts, {unseen} of them never"
    return (
        f"warning: the calibration text rarely reaches {counts}: what they do elsewhere is not judged. If the model is for "
        f"more than this text, {more}, or choose by the routers' rows alone (experts=stun)"
    )


def _is_rare(served_E: torch.Tensor) -> torch.Tensor:
    """Whether each expert got less than `RARE` of an even share of the tokens of a layer."""
    return (served_E < RARE * served_E.mean()) | (served_E == 0)
