"""One decoder layer at a time: read, spread over the ranks, run expert-parallel, release.

Every expert is read, run and written by its owner alone; every dense tensor is read by one rank and broadcast. While a layer
computes, the next one is read and the one before is written.

The unit of work is a micro-batch of samples. Micro-batch m runs on rank m % world, and an owner serves the micro-batches of a
round in that order and never joins two of them into one product. So every product has the same shape, and every sum the
same order, whatever the number of ranks.

Shapes: T tokens of a micro-batch, K top-k, D hidden, E experts, N = T * K routed rows, n rows of one expert.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from stun.arch import EXPERTS_IMPLEMENTATION, Architecture
from stun.config import Precision, StunError
from stun.layout import LayerLayout
from stun.names import experts_of
from stun.products import linear, stretched
from stun.ranks import Ranks
from stun.sparsify.scores import require_finite
from stun.steady import steady
from stun.transfer import to_device


class Observer(Protocol):
    """What a pass may watch while a layer runs. `micro_batch` numbers them over all ranks; calls come in their order.

    A round is one micro-batch on every rank that has one left; all ranks see it start and end. What an observer does not define
    does nothing.
    """

    def round_starts(self, turn: int) -> None: ...

    def round_ends(self, turn: int) -> None: ...

    def routed(self, micro_batch: int, index_TK: torch.Tensor) -> None:
        """Experts chosen for the tokens of one of this rank's micro-batches."""

    def combined(self, micro_batch: int, index_tK: torch.Tensor, output_tKD: torch.Tensor) -> None:
        """What the chosen experts gave for some of these tokens. Called from several threads at once."""

    def expert(
        self,
        micro_batch: int,
        expert: int,
        input_nD: torch.Tensor,
        inner_nI: torch.Tensor,
        output_nD: torch.Tensor | None,
        gate_n: torch.Tensor,
    ) -> None:
        """One of this rank's experts served n tokens of a micro-batch; `gate_n` multiplies the outputs later, which are None
        where they are not computed. Called from several threads at once, each with another expert."""


@dataclass
class Layer:
    """One decoder layer, spread over the ranks.

    `dense` (on every rank) and `experts` (this rank's own, by number in the source) hold tensors in their stored dtype.
    `unused` are this rank's tensors to copy. `kept` lists the numbers of the surviving experts; rank `owner[i]` has `kept[i]`.
    """

    layout: LayerLayout
    dense: dict[str, torch.Tensor]
    experts: dict[int, dict[str, torch.Tensor]]
    unused: dict[str, torch.Tensor]
    kept: list[int]
    owner: list[int]
    module: nn.Module | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def release(self) -> None:
        """Let go of all tensors, whoever still holds the layer."""
        self.module = None
        for tensors in (self.dense, self.experts, self.unused):
            tensors.clear()


def tokens_together(hidden_TD: torch.Tensor, top_k: int) -> int:
    """Of how many tokens the experts' outputs are added up at once: on a CPU as many as stay in a core's cache."""
    return max(1, (1 << 18 if hidden_TD.device.type == "cpu" else 1 << 26) // (max(1, top_k) * hidden_TD.shape[1]))


class Exchange:
    """Sends the tokens of a layer's micro-batch to the owners of their experts, and the outputs back."""

    def __init__(self, layer: Layer, ranks: Ranks, dtype: torch.dtype):
        self.layer, self.ranks, self.dtype = layer, ranks, dtype
        self.observers: tuple[Observer, ...] = ()
        self.turn = 0  # of the round of micro-batches, one a rank, that is being run
        self.gives_outputs = True  # or only what the experts' last matrices see
        owner_E = torch.tensor(layer.owner, dtype=torch.int64)
        self.by_owner_E = torch.argsort(owner_E, stable=True)
        self.place_E = torch.argsort(self.by_owner_E).to(ranks.device)
        self.per_rank = torch.bincount(owner_E, minlength=ranks.world).tolist()
        self.first = sum(self.per_rank[: ranks.rank])
        self.mine = self.by_owner_E[self.first : self.first + self.per_rank[ranks.rank]].tolist()

    def forward(
        self, module: nn.Module, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Sum over a token's K experts, in top-k order, of weight times output: [T, D]. Where outputs are not computed, NaN: no
        result can come to depend on them unseen."""
        place_N = self.place_E[index_TK.flatten()]
        order_N = torch.argsort(place_N, stable=True)
        counts_RE = self.ranks.all_gather(torch.bincount(place_N, minlength=len(self.place_E))).cpu()
        send = [int(c.sum()) for c in counts_RE[self.ranks.rank].split(self.per_rank)]
        mine_Re = counts_RE[:, self.first : self.first + len(self.mine)]
        receive = mine_Re.sum(1).tolist()
        rows_ND = self.ranks.exchange(hidden_TD.index_select(0, order_N // index_TK.shape[1]), send, receive)
        gates_N = self.ranks.exchange(weights_TK.flatten()[order_N].float(), send, receive) if self.observers else rows_ND[:, 0]
        for observer in self.observers if len(index_TK) else ():
            observer.routed(self._micro_batch(self.ranks.rank), index_TK)
        served_ND = self._serve(module, rows_ND, gates_N, mine_Re)
        if served_ND is None:
            return hidden_TD.new_full((), torch.nan).expand_as(hidden_TD)
        back_ND = self.ranks.exchange(served_ND, receive, send)
        back_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
        return self._combine(back_ND, back_N.view_as(index_TK), index_TK, weights_TK)

    def _micro_batch(self, rank: int) -> int:
        """The number of the micro-batch that `rank` runs in this round."""
        return self.turn * self.ranks.world + rank

    def _serve(
        self, module: nn.Module, rows_ND: torch.Tensor, gates_N: torch.Tensor, counts_Re: torch.Tensor
    ) -> torch.Tensor | None:
        """Outputs of this rank's experts for the rows of each micro-batch, a product per expert and micro-batch; experts side by
        side."""
        output_ND = torch.empty_like(rows_ND) if self.gives_outputs else None
        ends_Re = counts_Re.flatten().cumsum(0).view_as(counts_Re).tolist()

        def serve(place: int) -> None:
            for rank, count in enumerate(counts_Re[:, place].tolist()):
                if count:
                    start = ends_Re[rank][place] - count
                    rows = slice(start, start + count)
                    found_nD = self._serve_expert(
                        module, self._micro_batch(rank), self.mine[place], stretched(rows_ND, start, count), gates_N[rows]
                    )
                    if output_ND is not None:
                        output_ND[rows] = found_nD[:count]

        self.ranks.workers.map(serve, range(len(self.mine)))
        return output_ND

    def _serve_expert(
        self, module: nn.Module, micro_batch: int, number: int, input_mD: torch.Tensor, gate_n: torch.Tensor
    ) -> torch.Tensor | None:
        """Outputs for rows of which the first n are the expert's own."""
        inner_mI, count = self.inner(module, number, input_mD), len(gate_n)
        output_mD = self.project(number, "down_proj", inner_mI) if self.gives_outputs else None
        for observer in self.observers:
            output_nD = None if output_mD is None else output_mD[:count]
            observer.expert(micro_batch, number, input_mD[:count], inner_mI[:count], output_nD, gate_n)
        return output_mD

    def _combine(
        self, back_ND: torch.Tensor, place_TK: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Sum over each token's outputs, which stand in `back_ND` at `place_TK`, in float32, some tokens at a time: [T, D]."""
        output_TD = back_ND.new_empty(len(place_TK), back_ND.shape[1])
        size = tokens_together(back_ND, place_TK.shape[1])

        def combine(start: int) -> None:
            tokens = slice(start, start + size)
            place_tK = place_TK[tokens]
            output_tKD = back_ND.index_select(0, place_tK.flatten()).view(*place_tK.shape, -1).float()
            for observer in self.observers:
                observer.combined(self._micro_batch(self.ranks.rank), index_TK[tokens], output_tKD)
            output_TD[tokens] = (output_tKD * weights_TK[tokens, :, None]).sum(1)

        self.ranks.workers.map(combine, range(0, len(place_TK), size))
        return output_TD

    def inner(self, module: nn.Module, number: int, input_nD: torch.Tensor) -> torch.Tensor:
        """What an expert's `down_proj` is applied to: [n, I]."""
        return module._apply_gate(self.project(number, "gate_up_proj", input_nD))

    def project(self, number: int, part: str, rows_nD: torch.Tensor) -> torch.Tensor:
        """Rows times one of an expert's matrices, plus its bias where the family has one."""
        parts = self.layer.experts[self.layer.kept[number]]
        weight, bias = self.layer.layout.oriented(parts[part]), parts.get(f"{part}_bias")
        return linear(rows_nD, weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def idle_round(self, module: nn.Module, hidden_size: int, top_k: int) -> None:
        """Take part in a round for which this rank has no micro-batch."""
        device = self.ranks.device
        hidden_TD = torch.empty(0, hidden_size, device=device, dtype=self.dtype)
        index_TK = torch.empty(0, top_k, device=device, dtype=torch.int64)
        self.forward(module, hidden_TD, index_TK, torch.empty(0, top_k, device=device))


def _run_experts(module, hidden_states, top_k_index, top_k_weights):
    """The experts implementation that transformers calls inside a decoder layer."""
    return module.exchange.forward(module, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _run_experts)


@cache
def multiplies_tiles() -> bool:
    """Whether this CPU has instructions for whole tiles of bfloat16 (AMX). Without them products in it are slower than in
    float32, those of pairs (AVX512_BF16) included; with them four to seven times as fast."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return bool(flags) and "amx_bf16" in flags[1].split()


def compute_dtype(arch: Architecture, device: torch.device) -> torch.dtype:
    """The dtype the checkpoint is stored in, where the device multiplies it fast and the job does not ask for float32."""
    is_fast = device.type != "cpu" or (arch.dtype is torch.bfloat16 and multiplies_tiles())
    return arch.dtype if is_fast and arch.precision is Precision.auto else torch.float32


def check_alike(arch: Architecture, ranks: Ranks) -> None:
    """Raises StunError, on all ranks, where some of their CPUs would compute in another dtype than others."""
    found = ranks.gather_objects(str(compute_dtype(arch, ranks.device)))
    if len(set(found)) > 1:
        ranks.on_first(lambda: _refuse(f"the ranks' CPUs compute in {', '.join(sorted(set(found)))}; give precision=float32"))


def _refuse(message: str) -> None:
    raise StunError(message)


def even_owners(layout: LayerLayout, world: int) -> list[int]:
    """Owner of every expert of a layer, in equal blocks."""
    return [number * world // layout.num_experts for number in range(layout.num_experts)]


class LayerStream:
    """Iterates over `layouts` of `arch` from number `first` on; `owners[l][e]` is the rank that reads expert e of the l-th,
    None: nobody."""

    def __init__(
        self, arch: Architecture, ranks: Ranks, layouts: list[LayerLayout], owners: list[list[int | None]], first: int = 0
    ):
        self.arch, self.ranks, self.layouts, self.owners, self.first = arch, ranks, layouts, owners, first
        self.dtype = compute_dtype(arch, ranks.device)
        self.stays, self.held = 0, []  # the first `stays` layers are held for the next iteration, built and ready to run
        self.steady: Callable[[], AbstractContextManager] = partial(steady, ranks.device, self.dtype, ranks.workers)

    def __iter__(self) -> Iterator[Layer]:
        first = self.first + len(self.held)
        with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
            pending = pool.submit(self._read, first) if first < len(self.layouts) else None
            yield from self.held
            for index in range(first, len(self.layouts)):
                self.ranks.meter.enter("read")
                own, experts, seconds = pending.result()
                if index + 1 < len(self.layouts):
                    pending = pool.submit(self._read, index + 1)
                layer = self._spread(index, own, experts, seconds)
                del own, experts
                yield layer
                if index - self.first < self.stays:
                    self._hold(layer)
                else:
                    layer.release()
                self.ranks.return_memory()

    def _hold(self, layer: Layer) -> None:
        """Keep a layer that has run in what it computes with, and no other form."""
        for expert in layer.experts.values():
            expert.update({part: tensor.to(self.dtype) for part, tensor in expert.items()})
        layer.dense.clear()
        layer.unused.clear()
        self.held.append(layer)

    def writer_of(self, layout: LayerLayout) -> dict[str, int]:
        """The rank that writes each tensor of a layer that does not belong to one expert; it also reads those outside the
        experts."""
        names = [*layout.copied, *layout.fused_names.values()]
        return {name: j % self.ranks.world for j, name in enumerate(names)}

    def _read(self, index: int) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, torch.Tensor]], float]:
        """This rank's part of a layer, from disk."""
        start, before, layout = time.perf_counter(), self.arch.source.bytes_read, self.layouts[index]
        owners = self.writer_of(layout)
        own = {name: self.arch.source.read(name) for name in layout.copied if owners[name] == self.ranks.rank}
        experts = {
            number: self.arch.read_expert(layout, number)
            for number in range(layout.num_experts)
            if self.owners[index][number] == self.ranks.rank
        }
        seconds = time.perf_counter() - start
        self.ranks.meter.read(self.arch.source.bytes_read - before, seconds)
        return own, experts, seconds

    def _spread(
        self, index: int, own: dict[str, torch.Tensor], experts: dict[int, dict[str, torch.Tensor]], seconds: float
    ) -> Layer:
        """The layer on all ranks: dense tensors broadcast by their readers.

        Measured against DeepSpeed's zero.Init with one gather per layer (102 MB layer, CPU, gloo): 0.31 against 1.48 seconds on 2
        ranks and 0.50 against 2.69 on 4, a quarter of the traffic, and less memory.
        """
        layout, device = self.layouts[index], self.ranks.device
        owners, dense = self.writer_of(layout), {}
        for name in sorted(layout.dense):
            info = self.arch.info(name)
            tensor = to_device(own[name], device) if name in own else torch.empty(info.shape, dtype=info.dtype, device=device)
            dense[name] = self.ranks.broadcast(tensor, owners[name])
        placed = {number: {part: to_device(t, device) for part, t in expert.items()} for number, expert in experts.items()}
        kept = [number for number in range(layout.num_experts) if self.owners[index][number] is not None]
        unused = {name: own[name] for name in layout.unused if name in own}
        owner = [self.owners[index][number] for number in kept]
        return Layer(layout, dense, placed, unused, kept, owner, seconds={"read": seconds})

    def keep(self, layer: Layer, kept: list[int]) -> None:
        """Drop all experts of `layer` but `kept`, and their rows of the router."""
        owner = dict(zip(layer.kept, layer.owner, strict=True))
        layer.owner = [owner[number] for number in kept]
        layer.kept = kept
        layer.experts = {number: expert for number, expert in layer.experts.items() if number in set(kept)}
        if kept != list(range(layer.layout.num_experts)):
            entries = torch.tensor(kept, device=self.ranks.device)
            for name, dim in layer.layout.routed.items():
                layer.dense[name] = layer.dense[name].index_select(dim, entries)

    def build(self, layer: Layer) -> None:
        """Make `layer.module` ready to run with the layer's present tensors."""
        layer.module = self.arch.build_layer(layer.layout.index, len(layer.kept))
        self.arch.install(layer.module, layer.layout, layer.dense, self.dtype)
        found = experts_of(layer.module)
        if found:
            found[1].exchange = Exchange(layer, self.ranks, self.dtype)

    def run(self, layer: Layer, states: States, *observers: Observer) -> States:
        """`layer` applied to every micro-batch of this rank; all ranks take part in every round."""
        return States(self._rounds(layer, states, observers, True), states.arguments, states.total)

    def measure(self, layer: Layer, states: States, *observers: Observer) -> None:
        """The same for the observers' sake alone: what the experts give is not computed."""
        self._rounds(layer, states, observers, False)

    @torch.no_grad()
    def _rounds(self, layer: Layer, states: States, observers: tuple[Observer, ...], gives_outputs: bool) -> list[torch.Tensor]:
        found = experts_of(layer.module)
        experts = found[1] if found else None
        if experts is not None:
            experts.exchange.observers, experts.exchange.gives_outputs = observers, gives_outputs
        outputs = []
        for turn in range(-(-states.total // self.ranks.world)):
            if experts is not None:
                experts.exchange.turn = turn
            for observer in observers:
                observer.round_starts(turn)
            if turn < len(states.hidden):
                hidden_BTD = states.hidden[turn]
                arguments = states.arguments[turn][layer.layout.index]
                with self.steady():
                    output = layer.module(hidden_BTD, **arguments)
                if gives_outputs:
                    outputs.append(output[0] if isinstance(output, tuple) else output)
                    require_finite(outputs[-1], f"layer {layer.layout.index}: output of micro-batch {turn}")
                self.ranks.meter.tokens += hidden_BTD.shape[:2].numel()
            elif experts is not None:
                with self.steady():
                    experts.exchange.idle_round(experts, self.arch.config.hidden_size, self.arch.top_k)
            for observer in observers:
                observer.round_ends(turn)
        return outputs


@dataclass
class States:
    """Hidden states of this rank's micro-batches [B, T, D], `total` of them over all ranks.

    `arguments[i][l]` are the keyword arguments of layer l for the i-th of them; micro-batches of one shape may share them.
    """

    hidden: list[torch.Tensor]
    arguments: list[list[dict]]
    total: int


def from_first(arch: Architecture, ranks: Ranks, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A source tensor on every rank, which the first gets from `read` and broadcasts."""
    info = arch.info(name)
    if ranks.is_first:
        tensor = read(name).to(ranks.device)
    else:
        tensor = torch.empty(info.shape, dtype=info.dtype, device=ranks.device)
    return ranks.broadcast(tensor, 0)


def embed(arch: Architecture, ranks: Ranks, batches: list[torch.Tensor], read: Callable[[str], torch.Tensor]) -> States:
    """This rank's share of the micro-batches [B, T] as they reach the first layer. The first rank gets the embedding's weight
    from `read` and broadcasts it."""
    dtype = compute_dtype(arch, ranks.device)
    weight_VD = from_first(arch, ranks, arch.embedding, read).to(dtype)
    hidden, arguments, of_shape = [], [], {}
    for batch in batches[ranks.rank :: ranks.world]:
        with steady(ranks.device, dtype, ranks.workers):
            states, of_layers = arch.enter(batch.to(ranks.device), weight_VD)
        hidden.append(states)
        if batch.shape not in of_shape:
            of_shape[batch.shape] = _of_one_row(of_layers, len(batch))
        arguments.append(of_shape[batch.shape])
    return States(hidden, arguments, len(batches))


def _of_one_row(arguments: list[dict], rows: int) -> list[dict]:
    """The same arguments, of which one row is in memory where all of a micro-batch's are alike: every shape of micro-batch has a
    mask of its own, of T x T entries a row in families without fused attention."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def once(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            is_alike = rows > 1 and tensor.dim() > 1 and len(tensor) == rows and bool((tensor == tensor[:1]).all())
            made[id(tensor)] = (tensor, tensor[:1].clone().expand_as(tensor) if is_alike else tensor)
        return made[id(tensor)][1]

    return tree_map_only(torch.Tensor, once, arguments)
