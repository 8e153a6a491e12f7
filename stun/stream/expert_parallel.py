"""Expert parallelism: each rank owns some experts of a layer; tokens are sent to the owners of their experts and back.

An owner computes the micro-batches of a round in order, each in a product of its own, and one thread computes an expert. So
every product has the same shape, and every sum the same order, for any number of ranks.

Shapes: T tokens of a micro-batch, K top-k, D hidden, I expert width, E experts, N = T * K routed rows, n rows of one expert, m
rows with padding after the first n, R ranks, e this rank's experts.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from stun.model.architecture import EXPERTS_IMPLEMENTATION
from stun.model.layer_layout import LayerLayout
from stun.runtime.matmul import linear, stretched
from stun.runtime.ranks import Ranks


class Observer(Protocol):
    """Callbacks of a layer's forward; all are optional. `micro_batch` is numbered over all ranks; calls are in its order.

    A round is one micro-batch on every rank, or none on ranks that have finished theirs; all ranks see it start and end.
    """

    reads_gates = False  # whether `expert` gets the gate weights, which are then sent along with the tokens

    def round_starts(self, turn: int) -> None: ...

    def round_ends(self, turn: int) -> None: ...

    def routed(self, micro_batch: int, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """Chosen experts and gate weights of the tokens of one of this rank's micro-batches."""

    def combined(self, tokens: slice, output_tKD: torch.Tensor) -> None:
        """Outputs of the chosen experts for some of these tokens. Called from several threads at once."""

    def expert(
        self, expert: int, micro_batch: int, input_nD: torch.Tensor, inner_nI: torch.Tensor, gate_n: torch.Tensor | None
    ) -> None:
        """Inputs of one of this rank's experts, and of its `down_proj`, for n tokens of a micro-batch, and their gate
        weights. Called from several threads at once, each with another expert; the micro-batches of one are in order."""


@dataclass
class Layer:
    """One decoder layer, distributed over the ranks.

    `dense` (on every rank) and `experts` (of this rank, by number in the source) hold tensors in their stored dtype. `unused`
    are the tensors that this rank copies. `kept` lists the experts kept, by number in the source; rank `owner[i]` has `kept[i]`.
    `novices` has, on every rank, a constant output [D] for each expert that was removed but is still routed to. `stored` are the
    tensors in place of a matrix of this rank that is written in another form than it is computed with, by source name and entry,
    and name; `rescaled` are the names of those of all experts that are on new scales, the same on every rank.
    """

    layout: LayerLayout
    dense: dict[str, torch.Tensor]
    experts: dict[int, dict[str, torch.Tensor]]
    unused: dict[str, torch.Tensor]
    kept: list[int]
    owner: list[int]
    novices: dict[int, torch.Tensor] = field(default_factory=dict)
    stored: dict[tuple[str, int | None], dict[str, torch.Tensor]] = field(default_factory=dict)
    rescaled: list[str] = field(default_factory=list)
    module: nn.Module | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def routed(self) -> list[int]:
        """Experts that the router chooses from, by number in the source."""
        return sorted([*self.kept, *self.novices])

    @property
    def written(self) -> list[int]:
        """Numbers that the experts kept are written under; beside novices they keep their own."""
        return self.kept if self.novices else list(range(len(self.kept)))

    def release(self) -> None:
        """Free all tensors, even while references to the layer remain."""
        self.module = None
        for tensors in (self.dense, self.experts, self.unused, self.novices, self.stored):
            tensors.clear()


def tokens_together(device: torch.device, width: int, top_k: int) -> int:
    """Tokens combined per block; on a CPU, as many as fit in a core's cache."""
    return max(1, (1 << 18 if device.type == "cpu" else 1 << 26) // (max(1, top_k) * width))


@dataclass(frozen=True)
class Route:
    """Ways of a round's rows: `order_N` sorts the chosen experts, `top_k` a token, of this rank's tokens by owner and expert,
    novices last; `send` are the rows for every rank, and `counts_Re` the rows of this rank's experts from every rank. `novice_x`
    are the novices, by place among them, of the rows that are not sent."""

    order_N: torch.Tensor
    top_k: int
    send: list[int]
    counts_Re: torch.Tensor
    novice_x: torch.Tensor

    @cached_property
    def place_TK(self) -> torch.Tensor:
        """Places of the chosen experts in that order."""
        places_N = torch.arange(len(self.order_N), device=self.order_N.device)
        return torch.empty_like(self.order_N).scatter_(0, self.order_N, places_N).view(-1, self.top_k)

    @cached_property
    def receive(self) -> list[int]:
        return self.counts_Re.sum(1).tolist()

    @cached_property
    def _ends_eR(self) -> list[list[int]]:
        return self.counts_Re.flatten().cumsum(0).view_as(self.counts_Re).T.tolist()

    @property
    def sent_N(self) -> torch.Tensor:
        """The part of `order_N` that is sent."""
        return self.order_N[: sum(self.send)]

    def rows(self, token_TD: torch.Tensor) -> torch.Tensor:
        """A row for every chosen expert, but novices, of every token, in the order of sending: [N, D]."""
        return token_TD.index_select(0, self.sent_N // self.top_k)

    def pieces(self, place: int) -> list[tuple[int, slice]]:
        """(rank, its rows) of the rows received for this rank's expert at `place`."""
        ends = enumerate(zip(self._ends_eR[place], self.counts_Re[:, place].tolist(), strict=True))
        return [(rank, slice(end - count, end)) for rank, (end, count) in ends if count]

    def sums(self, back_ND: torch.Tensor) -> torch.Tensor:
        """Sum of every token's rows that were sent, in top-k order: [T, D]."""
        if len(self.novice_x):
            back_ND = torch.cat([back_ND, back_ND.new_zeros(len(self.novice_x), back_ND.shape[1])])
        total_TD = back_ND.new_zeros(len(self.place_TK), back_ND.shape[1])
        for place_T in self.place_TK.T:
            total_TD += back_ND.index_select(0, place_T)
        return total_TD


class Exchange:
    """Exchange of a micro-batch's tokens and outputs with the owners of a layer's experts."""

    def __init__(self, layer: Layer, ranks: Ranks, dtype: torch.dtype):
        self.layer, self.ranks, self.dtype = layer, ranks, dtype
        self.observers: tuple[Observer, ...] = ()
        self.turn = 0  # number of the current round of micro-batches, one per rank
        self.gives_outputs = True  # False: experts stop before their last matrix
        owner_E = torch.tensor(layer.owner, dtype=torch.int64)
        self.by_owner_E = torch.argsort(owner_E, stable=True)
        places = dict(zip((layer.kept[number] for number in self.by_owner_E.tolist()), range(len(layer.kept)), strict=True))
        places |= {expert: len(places) + place for place, expert in enumerate(layer.novices)}
        self.place_E = torch.tensor([places[expert] for expert in layer.routed], device=ranks.device)
        self.per_rank = torch.bincount(owner_E, minlength=ranks.world).tolist()
        self.first = sum(self.per_rank[: ranks.rank])
        self.mine = self.by_owner_E[self.first : self.first + self.per_rank[ranks.rank]].tolist()

    def forward(
        self, module: nn.Module, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Sum over a token's K experts, in top-k order, of weight times output: [T, D]. NaN where outputs are not computed, so
        that no result can silently depend on them."""
        self.route = route = self._route(index_TK)
        send, receive = route.send, route.receive
        rows_ND = self.ranks.exchange(route.rows(hidden_TD), send, receive)
        needs_gates = any(observer.reads_gates for observer in self.observers)
        gates_N = self.ranks.exchange(weights_TK.flatten()[route.sent_N].float(), send, receive) if needs_gates else None
        for observer in self.observers if len(index_TK) else ():
            observer.routed(self.turn * self.ranks.world + self.ranks.rank, index_TK, weights_TK)
        served_ND = self._serve(module, rows_ND, gates_N, route)
        if served_ND is None:
            return hidden_TD.new_full((), torch.nan).expand_as(hidden_TD)
        back_ND = self.ranks.exchange(served_ND, receive, send)
        if self.layer.novices:
            constants_XD = torch.stack(list(self.layer.novices.values())).to(back_ND.dtype)
            back_ND = torch.cat([back_ND, constants_XD.index_select(0, route.novice_x)])
        return self._combine(back_ND, route.place_TK, weights_TK)

    def _route(self, index_TK: torch.Tensor) -> Route:
        """Route of a micro-batch's tokens to the owners of their chosen experts."""
        place_N = self.place_E[index_TK.flatten()]
        order_N = torch.argsort(place_N, stable=True)
        # Not bincount, for which a GPU is waited for twice. This one wait is the micro-batch's only one.
        counts_E = torch.zeros_like(self.place_E).index_add_(0, place_N, torch.ones_like(place_N))
        kept = sum(self.per_rank)
        counts_RE = self.ranks.all_gather(counts_E).cpu()[:, :kept]
        send = [int(c.sum()) for c in counts_RE[self.ranks.rank].split(self.per_rank)]
        counts_Re = counts_RE[:, self.first : self.first + len(self.mine)]
        unsent_x = order_N[sum(send) :]  # empty without novices
        novice_x = place_N[unsent_x] - kept if self.layer.novices else unsent_x
        return Route(order_N, index_TK.shape[1], send, counts_Re, novice_x)

    def _serve(self, module: nn.Module, rows_ND: torch.Tensor, gates_N: torch.Tensor | None, route: Route) -> torch.Tensor | None:
        """Outputs of this rank's experts: one product per expert and micro-batch; experts run in parallel. None if outputs are
        not computed."""
        output_ND = torch.empty_like(rows_ND) if self.gives_outputs else None

        def serve(place: int) -> None:
            number = self.mine[place]
            for rank, rows in route.pieces(place):
                count = rows.stop - rows.start
                input_mD = stretched(rows_ND, rows.start, count)
                inner_mI, gate_n = self.inner(module, number, input_mD), None if gates_N is None else gates_N[rows]
                for observer in self.observers:
                    observer.expert(number, self.turn * self.ranks.world + rank, input_mD[:count], inner_mI[:count], gate_n)
                if output_ND is not None:
                    output_ND[rows] = self.project(number, "down_proj", inner_mI)[:count]

        self.ranks.workers.map(serve, range(len(self.mine)))
        return output_ND

    def _combine(self, back_ND: torch.Tensor, place_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Weighted sum in float32 of each token's outputs, the rows `place_TK` of `back_ND`, block by block: [T, D]."""
        output_TD = back_ND.new_empty(len(place_TK), back_ND.shape[1])
        size = tokens_together(back_ND.device, back_ND.shape[1], place_TK.shape[1])

        def combine(start: int) -> None:
            tokens = slice(start, start + size)
            place_tK = place_TK[tokens]
            output_tKD = back_ND.index_select(0, place_tK.flatten()).view(*place_tK.shape, -1).float()
            for observer in self.observers:
                observer.combined(tokens, output_tKD)
            output_TD[tokens] = (output_tKD * weights_TK[tokens, :, None]).sum(1)

        self.ranks.workers.map(combine, range(0, len(place_TK), size))
        return output_TD

    def inner(self, module: nn.Module, number: int, input_nD: torch.Tensor) -> torch.Tensor:
        """Input of an expert's `down_proj`: [n, I]."""
        if module.has_gate:
            return module._apply_gate(self.project(number, "gate_up_proj", input_nD))
        return module.act_fn(self.project(number, "up_proj", input_nD))

    def project(self, number: int, part: str, rows_nD: torch.Tensor) -> torch.Tensor:
        """Rows times one of an expert's matrices, plus its bias if the family has one."""
        parts = self.layer.experts[self.layer.kept[number]]
        weight, bias = self.layer.layout.oriented(parts[part]), parts.get(f"{part}_bias")
        return linear(rows_nD, weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def idle_round(self, module: nn.Module, top_k: int) -> None:
        """Take part in a round for which this rank has no micro-batch."""
        device = self.ranks.device
        hidden_TD = torch.empty(0, self.layer.layout.width, device=device, dtype=self.dtype)
        index_TK = torch.empty(0, top_k, device=device, dtype=torch.int64)
        self.forward(module, hidden_TD, index_TK, torch.empty(0, top_k, device=device))


def _run_experts(module, hidden_states, top_k_index, top_k_weights):
    """The experts implementation that transformers calls inside a decoder layer."""
    return module.exchange.forward(module, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _run_experts)
