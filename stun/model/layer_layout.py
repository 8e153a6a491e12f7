"""Roles of a decoder layer's tensors, by source name."""

import re
from dataclasses import dataclass, field

import torch

from stun.config import Scope

EXPERT_NUMBER = re.compile(r"(\.experts\.)(\d+)(\.)")
CONSTANT = "approx_value"  # last part of the name of a novice's constant (vLLM's design/expert_substitution.md)
# Small projections that control others and are never pruned: the gate of a shared expert, Mamba's time step, the decay of
# linear attention.
GATES = {"shared_expert_gate", "x_proj", "dt_proj", "in_proj_a", "in_proj_b", "in_proj_ba"}

# Linear modules that produce the output of their block: attention, an MLP, a shared expert.
CLOSING = {"o_proj", "out_proj", "down_proj", "w2", "o_b_proj", "dense", "fc2_latent_proj"}


@dataclass
class LayerLayout:
    """Tensors of one decoder layer, by source name.

    `dense` maps a name to the tensor inside the layer. `experts[e]` maps a parameter of the experts module (`gate_up_proj`,
    `down_proj`, ...) to the tensors whose rows, in order, make up expert e's part of it; for the parts in `fused` it is one
    tensor that holds all experts, and e is an index into it. `novices` maps experts without parts to their constants. `routed`
    maps dense names with an entry per expert to the dimension of these entries; `router` is the one with the router's rows.
    `tables` are integers, numbers of experts, such as those that a token's number leads to.
    `unused` are tensors without a parameter in the model, which are copied; `linears` maps the matrices that may be pruned to
    their scope. `is_transposed`: experts' matrices are [D, O]. `behind` are the matrices behind the experts, which see their
    outputs. `width` is the size of the experts' input.

    A multi-token-prediction head with experts has a layout too (`is_mtp`), of experts and router; its forward is never run.
    """

    index: int
    dense: dict[str, str] = field(default_factory=dict)
    experts: list[dict[str, tuple[str, ...]]] = field(default_factory=list)
    fused: frozenset[str] = frozenset()
    routed: dict[str, int] = field(default_factory=dict)
    router: str = ""
    unused: list[str] = field(default_factory=list)
    linears: dict[str, Scope] = field(default_factory=dict)
    novices: dict[int, str] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    width: int = 0
    is_transposed: bool = False
    is_mtp: bool = False

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def whole(self) -> list[int]:
        """Experts that are no novices."""
        return [number for number, parts in enumerate(self.experts) if parts]

    @property
    def copied(self) -> list[str]:
        """Names of all tensors outside the experts, in a fixed order, with the constants of novices."""
        return sorted([*self.dense, *self.unused, *self.novices.values()])

    @property
    def fused_names(self) -> dict[str, str]:
        """Part -> the tensor that holds it for all experts."""
        return {part: self.experts[0][part][0] for part in sorted(self.fused)}

    @property
    def biases(self) -> list[str]:
        """Router's biases, which the choice of experts adds to their scores."""
        return sorted(name for name in self.routed if name != self.router and name.endswith("bias"))

    def closes(self, name: str) -> bool:
        """Whether a dense matrix produces its block's output."""
        return self.dense[name].split(".")[-2] in CLOSING

    @property
    def shared_outputs(self) -> list[str]:
        """Names of the matrices that produce the output of shared experts."""
        return sorted(name for name, scope in self.linears.items() if scope is Scope.shared and self.closes(name))

    @property
    def output_matrix(self) -> str:
        """Name of the matrix that brings the experts' output back to the hidden size; empty where experts work in that."""
        return next((name for name in self.behind if self.closes(name)), "")

    def oriented(self, weight: torch.Tensor) -> torch.Tensor:
        """View [O, D] of an expert's matrix, whichever way it is stored."""
        return weight.T if self.is_transposed else weight


def renumber(name: str, expert: int) -> str:
    """Source name of an expert's tensor with the expert's number after pruning."""
    return EXPERT_NUMBER.sub(rf"\g<1>{expert}\g<3>", name, count=1)


def novice_name(layout: LayerLayout, expert: int) -> str:
    """Name of the constant [D] that a novice gives, beside the tensors of experts."""
    (some, *_) = layout.experts[expert]["down_proj"]
    match = EXPERT_NUMBER.search(some)
    return f"{some[: match.end(2)]}.{CONSTANT}"


def scope_of(path: str) -> Scope:
    """Scope of a linear module, from its path. Everything that mixes tokens counts as attention."""
    if "shared" in path:
        return Scope.shared
    first = path.split(".")[0]
    return Scope.mlp if any(word in first for word in ("mlp", "feed_forward", "moe")) else Scope.attention
