"""What the tensors of one decoder layer are for, by source name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from stun.config import Scope

EXPERT_NUMBER = re.compile(r"(\.experts\.)(\d+)(\.)")
# Small projections that steer rather than compute: the shared expert's gate, the time step of Mamba, the decay of linear
# attention.
GATES = {"shared_expert_gate", "x_proj", "dt_proj", "in_proj_a", "in_proj_b", "in_proj_ba"}

# Linear modules whose output is that of their block: attention, an MLP, a shared expert.
CLOSING = {"o_proj", "out_proj", "down_proj", "w2"}


@dataclass
class LayerLayout:
    """The tensors of one decoder layer, by source name.

    `dense` maps a name to the tensor inside the layer. `experts[e]` maps a parameter of the experts module (`gate_up_proj`,
    `down_proj`, ...) to the tensors whose rows make up expert e's part of it, in order; for the parts in `fused` it is one
    tensor, of which the expert has entry e. `routed` maps the dense names with one entry per expert to the dimension these lie
    along; `router` is the one that holds the router's rows. `unused` are tensors the model has no parameter for; they are
    copied. Experts' matrices that are stored with a row for each input are `is_transposed`.

    A multi-token-prediction head with experts has a layout too (`is_mtp`): the experts and their router, which no forward runs.
    """

    index: int
    dense: dict[str, str] = field(default_factory=dict)
    experts: list[dict[str, tuple[str, ...]]] = field(default_factory=list)
    fused: frozenset[str] = frozenset()
    routed: dict[str, int] = field(default_factory=dict)
    router: str = ""
    unused: list[str] = field(default_factory=list)
    linears: dict[str, Scope] = field(default_factory=dict)
    is_transposed: bool = False
    is_mtp: bool = False

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def copied(self) -> list[str]:
        """Names of all tensors but the experts', in a fixed order."""
        return sorted([*self.dense, *self.unused])

    @property
    def fused_names(self) -> dict[str, str]:
        """Tensors that hold a part of all experts, by part."""
        return {part: self.experts[0][part][0] for part in sorted(self.fused)}

    def closes(self, name: str) -> bool:
        """Whether a dense matrix gives its block's output."""
        return self.dense[name].split(".")[-2] in CLOSING

    def oriented(self, weight: torch.Tensor) -> torch.Tensor:
        """A view [O, D] of an expert's matrix, whichever way it is stored."""
        return weight.T if self.is_transposed else weight


def renumber(name: str, expert: int) -> str:
    """The source name of an expert's tensor, for the expert that is number `expert` after pruning."""
    return EXPERT_NUMBER.sub(rf"\g<1>{expert}\g<3>", name, count=1)


def scope_of(path: str) -> Scope:
    """Which part of a layer a linear module belongs to, from its path. Whatever mixes tokens counts as attention."""
    if "shared" in path:
        return Scope.shared
    first = path.split(".")[0]
    return Scope.mlp if any(word in first for word in ("mlp", "feed_forward", "moe")) else Scope.attention
