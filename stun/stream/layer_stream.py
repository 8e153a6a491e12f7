"""Stream of decoder layers, one at a time: read, distribute over the ranks, run expert-parallel, release.

An expert is read, run and written only by its owner; a dense tensor is read by one rank and broadcast. While a layer computes,
the next one is read and the previous one is written. The unit of work is a micro-batch of samples: micro-batch m runs on rank
m % world, for any number of ranks (stun.stream.expert_parallel).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch.utils._pytree import tree_map_only

from stun.model.architecture import Architecture, expert_infos, joined
from stun.model.as_configured import as_configured
from stun.model.carried import HIDDEN, Carried, Key, entries, evaluated, filled, is_expression
from stun.model.forward import Probe
from stun.model.layer_layout import LayerLayout
from stun.model.precision import compute_dtype
from stun.model.tensor_names import experts_of
from stun.runtime.determinism import steady
from stun.runtime.device_copies import memory_to_read_into
from stun.runtime.ranks import Ranks
from stun.runtime.threads import threads_on
from stun.sparsify.scores import require_finite
from stun.stream.expert_parallel import Exchange, Layer, Observer
from stun.stream.tables import renumbered


def even_owners(layout: LayerLayout, world: int) -> list[int | None]:
    """Owner of every expert of a layer, in contiguous blocks of nearly equal size; None for novices."""
    whole = layout.whole
    places = {number: place * world // len(whole) for place, number in enumerate(whole)}
    return [places.get(number) for number in range(layout.num_experts)]


@dataclass
class _Part:
    """This rank's part of a layer, as far as it is read: tensors outside the experts, experts, and the seconds that it took.
    `missing` are the names and numbers of what is still to be read."""

    missing: list[str | int]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    experts: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    seconds: float = 0.0


class LayerStream:
    """Iterator over `layouts` of `arch` from number `first` on. `owners[l][e]` is the rank that reads expert e of the l-th
    layer, None if no rank does."""

    def __init__(
        self, arch: Architecture, ranks: Ranks, layouts: list[LayerLayout], owners: list[list[int | None]], first: int = 0
    ):
        self.arch, self.ranks, self.layouts, self.owners, self.first = arch, ranks, layouts, owners, first
        self.dtype, self.memory = compute_dtype(arch, ranks.device), memory_to_read_into(ranks.device)
        self.reserved = 0  # bytes that work on a layer takes on a GPU beside what is there when the layer starts
        self.beside = 1  # streams that run side by side, this one among them, and share what room there is for reading ahead
        self.stays, self.held = 0, []  # the first `stays` layers are kept in `held` for the next iteration, ready to run
        self.steady = partial(steady, ranks.device, ranks.workers)

    def __iter__(self) -> Iterator[Layer]:
        first = self.first + len(self.held)
        with threads_on(self.ranks.device, 1, "read") as pool:
            pending = self._read_ahead(pool, first)
            yield from self.held
            for index in range(first, len(self.layouts)):
                self.ranks.meter.enter("read")
                part = pending.result()
                if part.missing:  # what had no room beside the layer before, which has been released
                    part = pool.submit(self._read, index, part, math.inf).result()
                self.memory.arrive()
                pending = self._read_ahead(pool, index + 1)
                layer = self._spread(index, part)
                del part  # only the layer may hold the tensors, so that releasing it frees the memory
                yield layer
                if index - self.first < self.stays:
                    self._hold(layer)
                else:
                    layer.release()
                self.ranks.return_memory()

    def _hold(self, layer: Layer) -> None:
        """Keep in memory a layer that has run, in the compute dtype only."""
        for expert in layer.experts.values():
            expert.update({part: tensor.to(self.dtype) for part, tensor in expert.items()})
        layer.dense.clear()
        layer.unused.clear()
        self.held.append(layer)

    def writer_of(self, layout: LayerLayout) -> dict[str, int]:
        """Rank that writes each tensor of a layer that is not one expert's; it also reads those outside the experts."""
        names = [*layout.copied, *layout.fused_names.values()]
        return {name: j % self.ranks.world for j, name in enumerate(names)}

    def _read_ahead(self, pool: ThreadPoolExecutor, index: int) -> Future[_Part] | None:
        """Begin to read as much of a layer as fits beside the one that computes; None if there is no such layer. The reading
        thread never waits for room: a process that ends waits for its threads."""
        if index == len(self.layouts):
            return None
        owners, rank = self.writer_of(self.layouts[index]), self.ranks.rank
        missing: list[str | int] = [name for name in self.layouts[index].copied if owners[name] == rank]
        missing += [number for number, owner in enumerate(self.owners[index]) if owner == rank]
        return pool.submit(self._read, index, _Part(missing), self.memory.room_ahead(self.reserved) / self.beside)

    def _read(self, index: int, part: _Part, room: float) -> _Part:
        """Read as much of what is missing in a layer's part as fits in so many bytes; returns the part."""
        start, before, layout = time.perf_counter(), self.arch.source.bytes_read, self.layouts[index]
        expert_bytes = sum(info.nbytes for info in expert_infos(self.arch, layout))
        with self.arch.source.reading(self.memory) as read:
            while part.missing:
                key = part.missing[0]
                room -= expert_bytes if isinstance(key, int) else self.arch.info(key).nbytes
                if room < 0:
                    break
                if isinstance(key, int):
                    part.experts[key] = self.arch.read_expert(layout, key, read)
                else:
                    part.tensors[key] = read(key)
                del part.missing[0]
        self.memory.trim()
        seconds = time.perf_counter() - start
        part.seconds += seconds
        self.ranks.meter.bytes_read += self.arch.source.bytes_read - before
        self.ranks.meter.read_seconds += seconds
        return part

    def _spread(self, index: int, part: _Part) -> Layer:
        """The layer on all ranks, with dense tensors broadcast by their readers.

        A 102 MB layer (CPU, gloo) takes 0.31 seconds on 2 ranks and 0.50 on 4, where DeepSpeed's zero.Init with one gather per
        layer takes 1.48 and 2.69, four times the traffic and more memory.
        """
        layout, device, local = self.layouts[index], self.ranks.device, part.tensors
        owners, spread = self.writer_of(layout), {}
        for name in [*sorted(layout.dense), *layout.novices.values()]:
            info = self.arch.info(name)
            tensor = local[name] if name in local else torch.empty(info.shape, dtype=info.dtype, device=device)
            spread[name] = self.ranks.broadcast(tensor, owners[name])
        novices = {number: spread.pop(name) for number, name in layout.novices.items()}
        kept = [number for number in range(layout.num_experts) if self.owners[index][number] is not None]
        unused = {name: local[name] for name in layout.unused if name in local}
        owner = [self.owners[index][number] for number in kept]
        return Layer(layout, spread, part.experts, unused, kept, owner, novices, seconds={"read": part.seconds})

    def keep(self, layer: Layer, kept: list[int], constants_ED: torch.Tensor | None = None) -> None:
        """Remove all experts of `layer` but `kept`, with their rows of the router and their places in tables; with `constants_ED`
        these are kept, and they are the experts' outputs."""
        owner = dict(zip(layer.kept, layer.owner, strict=True))
        layer.owner = [owner[number] for number in kept]
        layer.kept = kept
        layer.experts = {number: expert for number, expert in layer.experts.items() if number in set(kept)}
        if constants_ED is not None:
            layer.novices = {
                e: constants_ED[e].to(self.arch.novice_dtype(layer.layout)) for e in range(len(constants_ED)) if e not in kept
            }
        elif kept != list(range(layer.layout.num_experts)):
            for name in layer.layout.tables:
                layer.dense[name] = renumbered(layer.dense[name], kept, layer.dense[layer.layout.router])
            places = torch.tensor(kept, device=self.ranks.device)
            for name, dim in layer.layout.routed.items():
                layer.dense[name] = layer.dense[name].index_select(dim, places)

    def build(self, layer: Layer) -> None:
        """Build `layer.module` from the layer's current tensors."""
        layer.module = self.arch.build_layer(layer.layout.index, len(layer.routed))
        self.arch.install(layer.module, joined(layer.layout.dense, layer.dense), self.dtype)
        _, experts = experts_of(layer.module) or ("", None)
        if experts is not None:
            experts.exchange = Exchange(layer, self.ranks, self.dtype)

    def run(self, layer: Layer, states: States, *observers: Observer) -> States:
        """States after `layer`, for every micro-batch of this rank; all ranks take part in every round."""
        carried: list[Carried] = []
        return replace(states, hidden=self._rounds(layer, states, observers, True, carried), carried=carried)

    def measure(self, layer: Layer, states: States, *observers: Observer) -> None:
        """Run `layer` only for the observers: experts stop before their last matrix, unless another is behind them."""
        self._rounds(layer, states, observers, bool(layer.layout.behind), [])

    @torch.no_grad()
    def _rounds(
        self, layer: Layer, states: States, observers: tuple[Observer, ...], gives_outputs: bool, carried: list[Carried]
    ) -> list[torch.Tensor]:
        """Hidden states after the layer; fills `carried` with what it and the layers before hand on."""
        _, experts = experts_of(layer.module) or ("", None)
        if experts is not None:
            experts.exchange.observers, experts.exchange.gives_outputs = observers, gives_outputs
        outputs, sums = [], []
        for turn in range(-(-states.total // self.ranks.world)):
            if experts is not None:
                experts.exchange.turn = turn
            for observer in observers:
                observer.round_starts(turn)
            if turn < len(states.hidden):
                hidden_BTD, arguments = states.inputs(turn, layer.layout.index)
                with self.steady(), as_configured(self.arch.source.folder, f"layer {layer.layout.index}"):
                    output = layer.module(hidden_BTD, **arguments)
                if gives_outputs:
                    outputs.append(output[0] if isinstance(output, tuple) else output)
                    sums.append(outputs[-1].sum())
                    carried.append(handed_on(self.arch.probe, layer.layout.index, states.carried[turn], arguments, output))
                self.ranks.meter.tokens += hidden_BTD.shape[:2].numel()
            elif experts is not None:
                with self.steady():
                    experts.exchange.idle_round(experts, self.arch.top_k)
            for observer in observers:
                observer.round_ends(turn)
        # NaN and infinity survive a sum. They are looked for once a layer, since a GPU is waited for then.
        for turn, is_finite in enumerate(torch.stack(sums).isfinite().tolist() if sums else ()):
            if not is_finite:
                where = f"{self.arch.source.folder}: layer {layer.layout.index}"
                require_finite(outputs[turn], f"{where}: output of micro-batch {turn}")
        return outputs


def handed_on(probe: Probe, index: int, before: Carried, arguments: dict, output: object) -> Carried:
    """Values that layers after layer `index` read beside its hidden states: of `before`, the layer's own, and what it has put
    into dictionaries among its `arguments`."""
    outputs = output if isinstance(output, tuple) else (output,)
    own = {Key(index, place): value for place, value in enumerate(outputs) if isinstance(value, torch.Tensor)}
    handed = {key: value for key, value in (before | own).items() if key in probe.needed[index]}
    for name in sorted(probe.filled & arguments.keys()):
        handed |= entries(name, arguments[name])
    return handed


@dataclass
class States:
    """Hidden states [B, T, D] of this rank's micro-batches (with residual streams [B, T, S, D]); `total` is their number over all
    ranks.

    `arguments[i][l]` are the keyword arguments of layer l for the i-th of them; micro-batches of one shape share them.
    `carried[i]` are the values that earlier layers hand on to later ones. `dense` are the states of the dense model, where a
    pruned one is compared with it.
    """

    hidden: list[torch.Tensor]
    arguments: list[list[dict]]
    total: int
    dense: States | None = None
    carried: list[Carried] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.carried = self.carried or [{} for _ in self.hidden]

    def first(self, world: int) -> States:
        """States of the first round of micro-batches."""
        return States(self.hidden[:1], self.arguments[:1], min(self.total, world), carried=self.carried[:1])

    def inputs(self, turn: int, index: int) -> tuple[torch.Tensor, dict]:
        """Hidden states and keyword arguments of layer `index` for a micro-batch."""
        hidden_BTD = self.hidden[turn]
        carried = self.carried[turn] | {Key(index - 1, 0): hidden_BTD}
        arguments = {}
        for name, value in self.arguments[turn][index].items():
            is_filled = isinstance(value, MutableMapping) and not len(value)
            arguments[name] = filled(value, name, carried) if is_filled else evaluated(value, carried)
        return arguments.pop(HIDDEN, hidden_BTD), arguments


def from_first(arch: Architecture, ranks: Ranks, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Source tensor on every rank: the first gets it from `read` and broadcasts it."""
    info = arch.info(name)
    own = read(name).to(ranks.device) if ranks.is_first else torch.empty(info.shape, dtype=info.dtype, device=ranks.device)
    return ranks.broadcast(own, 0)


def embed(arch: Architecture, ranks: Ranks, batches: list[torch.Tensor], read: Callable[[str], torch.Tensor]) -> States:
    """States before the first layer of this rank's share of the micro-batches [B, T]. The first rank gets the embedding's
    weight from `read` and broadcasts it."""
    dtype = compute_dtype(arch, ranks.device)
    weight_VD = from_first(arch, ranks, arch.embedding, read).to(dtype)
    hidden, arguments, by_shape = [], [], {}
    # The way to the first layer may need more of the decoder's weights than the embedding.
    others = {target: names for target, names in arch.outer_groups.items() if arch.embedding not in names}
    needed = [names for target, names in others.items() if arch.probe.reads_outside and target.startswith(arch.path)]
    with installed(arch, ranks, read, needed), as_configured(arch.source.folder, "the embedding"):
        for batch in batches[ranks.rank :: ranks.world]:
            with steady(ranks.device, ranks.workers):
                states, by_layer = arch.enter(batch.to(ranks.device), weight_VD)
            hidden.append(states)
            if batch.shape not in by_shape:
                by_shape[batch.shape] = _expanded(by_layer, len(batch))
            arguments.append(_with_own(by_shape[batch.shape], by_layer, arch.probe.by_token))
    return States(hidden, arguments, len(batches))


@contextmanager
def installed(
    arch: Architecture, ranks: Ranks, read: Callable[[str], torch.Tensor], groups: Iterable[list[str]]
) -> Iterator[None]:
    """Context with weights outside the layers installed, by groups of those that become one tensor of the model."""
    dtype = compute_dtype(arch, ranks.device)
    with arch.outside_restored():
        for names in groups:
            arch.install_outer({name: from_first(arch, ranks, name, read) for name in names}, dtype)
        yield


def _with_own(shared: list[dict], own: list[dict], by_token: list[set[str]]) -> list[dict]:
    """Arguments that micro-batches of one shape share, with those that depend on the tokens."""
    if not any(by_token):
        return shared
    triples = zip(shared, own, by_token, strict=True)
    return [layer | {name: its[name] for name in names} for layer, its, names in triples]


def _expanded(arguments: list[dict], rows: int) -> list[dict]:
    """The same arguments; tensors whose rows are all equal become views of one row. It matters for masks: every shape of
    micro-batch has one, with T x T entries a row in families without fused attention."""
    # Values are kept with the originals, since ids are unique only among living objects.
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def once(tensor: torch.Tensor) -> torch.Tensor:
        if is_expression(tensor):
            return tensor
        if id(tensor) not in made:
            is_equal = rows > 1 and tensor.dim() > 1 and len(tensor) == rows and bool((tensor == tensor[:1]).all())
            made[id(tensor)] = (tensor, tensor[:1].clone().expand_as(tensor) if is_equal else tensor)
        return made[id(tensor)][1]

    return tree_map_only(torch.Tensor, once, arguments)
