"""Sums over the inputs of a layer's matrices on the calibration tokens, held by the rank that prunes each matrix.

Parts are added in the order of the micro-batches, so that any number of ranks gives the same bits: an expert's owner serves the
micro-batches in that order, and the owner of a dense matrix receives their parts one after the other.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

from stun.config import StunError
from stun.runtime.matmul import tf32
from stun.runtime.ranks import Ranks
from stun.statistics.accumulators import add_squares, squared_sum
from stun.stream.expert_parallel import Layer, Observer
from stun.stream.layer_stream import LayerStream, States

_ROWS = 1024  # rows of a dense matrix' inputs that one worker adds up


def gram(rows_TD: torch.Tensor) -> torch.Tensor:
    """Sum of x x^T over the rows, [D, D] in float32."""
    return add_gram(None, rows_TD)


def add_gram(sum_DD: torch.Tensor | None, rows_TD: torch.Tensor) -> torch.Tensor:
    """`sum_DD` plus `gram` of the rows, in place; None is zeros."""
    is_exact = rows_TD.dtype is torch.bfloat16  # TF32 holds all bits of such inputs
    rows_TD = rows_TD.float()
    if not rows_TD.is_cuda:
        return added(sum_DD, rows_TD.T @ rows_TD)
    sum_DD = rows_TD.new_zeros(rows_TD.shape[1], rows_TD.shape[1]) if sum_DD is None else sum_DD
    with tf32() if is_exact else nullcontext():
        return sum_DD.addmm_(rows_TD.T, rows_TD)


def added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """`total` plus `part`, in place; `part` itself if there is no total yet."""
    return part if total is None else total.add_(part)


class Sums(Observer):
    """Observer that adds up what `add_expert` and `of_dense` measure in every micro-batch, by name of the sum.

    `experts[number]` holds the sums of each expert in `numbers` that was routed tokens, on its owner; `dense[name]` those of a
    dense matrix, on the rank that writes it. `tokens` counts the tokens of this rank's experts.
    """

    def __init__(self, stream: LayerStream, layer: Layer, names: list[str], numbers: list[int]):
        self.stream, self.layer, self.names, self.numbers = stream, layer, names, set(numbers)
        self.owners = stream.writer_of(layer.layout)
        self.experts: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        self.dense: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        self.tokens = torch.zeros(len(layer.kept), dtype=torch.int64)
        self._turn: dict[str, dict[str, torch.Tensor]] = {}

    def add_expert(self, sums: dict[str, torch.Tensor], number: int, input_nD, inner_nI, gate_n) -> None:
        """Add n tokens of an expert to its sums, which are empty at first."""
        raise NotImplementedError

    def of_dense(self, name: str, turn: int, input_TD) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the sums of a dense matrix [rows, columns]."""
        raise NotImplementedError

    def expert(self, expert, micro_batch, input_nD, inner_nI, gate_n) -> None:
        self.tokens[expert] += len(input_nD)
        if expert in self.numbers:
            self.add_expert(self.experts[expert], expert, input_nD, inner_nI, gate_n)

    def run(self, states: States, *others: Observer) -> States:
        """Outputs of the layer, run once under this observer and `others`."""
        with self._watching(states):
            return self.stream.run(self.layer, states, self, *others)

    def measure(self, states: States) -> None:
        """Run the layer once under this observer, without outputs."""
        with self._watching(states):
            self.stream.measure(self.layer, states, self)

    @contextmanager
    def _watching(self, states: States) -> Iterator[None]:
        self._states = states
        with ExitStack() as hooks:
            for name in self.names:
                module = self.layer.module.get_submodule(self.layer.layout.dense[name].rpartition(".")[0])
                hooks.enter_context(module.register_forward_pre_hook(partial(self._runs, name)))
            yield

    def _runs(self, name: str, module: nn.Module, arguments: tuple) -> None:
        """Hook of the linear module whose weight is `name`."""
        if name in self._turn:
            raise StunError(f"{name}: ran more than once in a micro-batch; its inputs are not known")
        self._turn[name] = self.of_dense(name, self._now, arguments[0])

    def round_starts(self, turn: int) -> None:
        self._now = turn

    def round_ends(self, turn: int) -> None:
        """Send each dense matrix' part of this round to its owner."""
        ranks = self.stream.ranks
        busy = min(ranks.world, self._states.total - turn * ranks.world)
        parts, self._turn = self._turn, {}
        if ranks.rank < busy and len(parts) < len(self.names):
            raise StunError(
                f"{sorted(set(self.names) - parts.keys())[0]}: did not run in a micro-batch; its inputs are not known"
            )
        for name in self.names:
            for key, (shape, dtype) in self.shapes(*self.layer.dense[name].shape).items():
                for rank in range(busy):
                    mine = parts[name][key] if rank == ranks.rank else None
                    part = ranks.moved(mine, shape, dtype, rank, self.owners[name])
                    if part is not None:
                        sums = self.dense[name]
                        sums[key] = sums[key].add_(part) if key in sums else part.clone()


class Moments(Sums):
    """Sums of squares [D] of every matrix' inputs or, with `grams`, of outer products [D, D]. With `gated`, the experts' inputs
    are multiplied by their gate weights. Experts have one sum per part. `inputs` are the inputs of the dense matrices in
    `remember`, by turn. Four of the seven parameters are those of `Sums`."""

    def __init__(self, stream, layer, names, numbers, grams: bool, gated: bool, remember: Sequence[str] = ()):
        super().__init__(stream, layer, names, numbers)
        self.grams, self.gated, self.reads_gates = grams, gated, gated
        self.inputs: dict[str, list[torch.Tensor]] = {name: [] for name in remember}
        self._last: tuple[torch.Tensor | None, dict] = (None, {})  # matrices with the same input, such as q, k and v

    def _add(self, total: torch.Tensor | None, rows_TD: torch.Tensor) -> torch.Tensor:
        return add_gram(total, rows_TD) if self.grams else add_squares(total, rows_TD)

    def _of_many(self, rows_TD: torch.Tensor) -> torch.Tensor:
        """Sums of a whole micro-batch, on a CPU by all workers; their parts are added in order, so that every run gets the same
        sum."""
        if self.grams or rows_TD.is_cuda:
            return self._add(None, rows_TD)
        first, *others = self.stream.ranks.workers.map(squared_sum, rows_TD.split(_ROWS))
        return sum(others, first)

    def add_expert(self, sums, number, input_nD, inner_nI, gate_n) -> None:
        first = next(part for part in ("gate_up_proj", "up_proj") if part in self.layer.layout.experts[self.layer.kept[number]])
        for part, rows in {first: input_nD, "down_proj": inner_nI}.items():
            sums[part] = self._add(sums.get(part), rows.float() * gate_n[:, None] if self.gated else rows)

    def of_dense(self, name, turn, input_TD) -> dict[str, torch.Tensor]:
        if name in self.inputs:
            self.inputs[name].append(input_TD)
        if self._last[0] is not input_TD:
            self._last = (input_TD, {"inputs": self._of_many(input_TD.flatten(0, -2))})
        return self._last[1]

    def round_ends(self, turn) -> None:
        super().round_ends(turn)
        self._last = (None, {})

    def shapes(self, rows, columns):
        return {"inputs": ((columns, columns), torch.float32) if self.grams else ((columns,), torch.float64)}


def pooled(norms: dict[int, dict[str, torch.Tensor]], ranks: Ranks) -> dict[str, torch.Tensor]:
    """Sums of squares over the experts of all ranks, used for experts without tokens; added in the order of the experts."""
    local = {number: {part: row.cpu() for part, row in parts.items()} for number, parts in norms.items()}
    experts = {number: parts for gathered in ranks.gather_objects(local) for number, parts in gathered.items()}
    sums: dict[str, torch.Tensor] = {}
    for number in sorted(experts):
        for part, row in experts[number].items():
            sums[part] = sums[part] + row if part in sums else row
    return {part: row.to(ranks.device) for part, row in sums.items()}
