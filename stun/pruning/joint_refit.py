"""Joint refit: the down projections of a layer's experts kept, fitted together to the dense layer's output, with those of shared
experts and the constants of novices (stun.pruning.replicated).

The output of a layer is linear in all of them: y = sum over experts of g W h, with h an expert's inner state and g its gate. So
those that are kept can take over what removed experts and weights did, and make up for the errors of earlier layers: minimised is
the squared difference from the hidden states of the dense model, on the inputs that the pruned model gives the layer. Every
expert's owner holds its matrices and inner states; what is missing in the outputs stays with the tokens and travels to the owners
like the tokens themselves. What the layer does with y before it adds it (stun.stream.output_path) is in the inputs, where tokens
have factors, in the matrices, where channels have gains, or between the two.

Shapes: T tokens of a micro-batch, D hidden, I expert width, N routed rows of a rank, n rows of one expert in a micro-batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from stun.model.tensor_names import experts_of
from stun.pruning.replicated import Gated, Replicated, Shared, constants
from stun.pruning.rounding import Rounding
from stun.sparsify.joint_refit import DAMPING, STEPS, damped_factor, descend, preconditioned, refitted
from stun.statistics.input_moments import gram
from stun.stream.expert_parallel import Exchange, Layer, Observer
from stun.stream.layer_stream import LayerStream, States
from stun.stream.output_path import PathFinder, inner

T = TypeVar("T")
HELD_OUT = 8  # one micro-batch in so many decides when to stop


def refit_jointly(
    stream: LayerStream, layer: Layer, states: States, dense: list[torch.Tensor], rounding: Rounding, steps: int = STEPS
) -> dict:
    """Refit in place the down projections of the experts kept of a built layer, so that its outputs for `states` come nearer to
    the `dense` ones, in at most so many `steps`. Returns the number of steps taken, and the squared error before and after, of
    weights as they are written. All ranks call this together.

    Never raises the error on these tokens: otherwise the weights stay. Raises StunError if the layer does more with the output of
    its experts than stun.stream.output_path says.
    """
    problem = _Refit(stream, layer, states, dense, rounding)
    before, taken = problem.error(), descend(problem, steps)
    after = problem.error() if taken else before
    if after < before:
        problem.install()
    else:
        rounding.fits.clear()
    return {"steps": taken if after < before else 0, "error": [before, min(before, after)]}


@dataclass(frozen=True)
class _Piece(Gated):
    """Rows of an expert from one micro-batch: inner states [n, I], gates, and places among those that its rank received in the
    round."""

    micro_batch: int
    rows: slice


class _Inputs(Observer):
    """Observer that keeps the route of every round, the pieces of this rank's experts by round and number, and the gate weights
    [T, X] of novices in this rank's micro-batches."""

    reads_gates = True

    def __init__(self, exchange: Exchange):
        self.exchange, self.routes, self.pieces, self.gates = exchange, [], [], []
        self._round: dict[int, list[tuple[int, torch.Tensor, torch.Tensor]]] = defaultdict(list)

    def routed(self, micro_batch, index_TK, weights_TK) -> None:
        kept, novices = len(self.exchange.layer.kept), len(self.exchange.layer.novices)
        place_TK = self.exchange.place_E[index_TK] - kept
        gates_TX = torch.zeros(len(index_TK), novices + 1, device=index_TK.device)  # the last column is that of experts kept
        gates_TX.scatter_(1, place_TK.masked_fill(place_TK < 0, novices), weights_TK.float())
        self.gates.append(gates_TX[:, :novices].contiguous())

    def expert(self, expert, micro_batch, input_nD, inner_nI, gate_n) -> None:
        self._round[expert].append((micro_batch, inner_nI, gate_n))

    def round_ends(self, turn) -> None:
        route, pieces = self.exchange.route, {}
        for place, number in enumerate(self.exchange.mine):
            parts = zip(route.pieces(place), self._round[number], strict=True)
            pieces[number] = [_Piece(inner_nI, gate_n, batch, rows) for (_, rows), (batch, inner_nI, gate_n) in parts]
        self.routes.append(route)
        self.pieces.append(pieces)
        self._round.clear()


class _Refit:
    """The problem of stun.sparsify.joint_refit for a layer.

    `change` (X), `direction` (P) and `slope` (the gradient, then its preconditioned form) hold a matrix [D, I] for each of this
    rank's experts, by number; `missing` what the outputs [T, D] of each of its micro-batches lack, and `added` what P adds there.
    """

    def __init__(self, stream: LayerStream, layer: Layer, states: States, dense: list[torch.Tensor], rounding: Rounding):
        self.stream, self.states, self.dense = stream, states, dense
        self.layer, self.ranks, self.width = layer, stream.ranks, layer.layout.width
        self.rounding, self.is_changed = rounding, False
        _, experts = experts_of(layer.module)
        inputs, self.mine = _Inputs(experts.exchange), experts.exchange.mine
        shared, finder = Shared(layer), PathFinder(stream, layer)
        with finder.watching():
            outputs = shared.run(stream, states, inputs)
        self.path = finder.path(states, outputs)
        self.missing, self.unreachable = self._missing(dense, outputs)
        self.added: list[torch.Tensor] = []
        self.routes, self.holds_out = inputs.routes, states.total >= HELD_OUT
        self.pieces = self._weighted(inputs.pieces)
        self.change = {n: torch.zeros_like(self._weight(n), dtype=torch.float32) for n in self.mine}
        self.direction = {number: torch.zeros_like(change_DI) for number, change_DI in self.change.items()}
        self.slope: dict[int, torch.Tensor] = {}
        self.damping, self.factors = self._factors()
        self.damping *= self.path.size
        self.constants = constants(layer, inputs.gates, self.path)
        self.shared = shared.replicated(stream, states, outputs, self.path, finder.steady_norms)
        self.replicated = [*self.constants, *self.shared]
        mine = range(self.ranks.rank, states.total, self.ranks.world)
        for matrix in self.replicated:
            matrix.prepare(self.ranks, len(self.routes), [not self._is_held_out(batch) for batch in mine])

    def _missing(self, dense: list[torch.Tensor], outputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
        """What outputs of this rank's micro-batches lack, as far as experts can give it, and the squared rest of all ranks'."""
        missing, rest = [], {}
        for turn, (wanted, plain) in enumerate(zip(dense, outputs, strict=True)):
            lacking = wanted.float() - plain.float()
            missing.append(self.path.along(turn, lacking) / self.path.scale)
            if self.path.is_by_token:
                beside = self.path.beside(turn, lacking)
                rest[turn * self.ranks.world + self.ranks.rank] = inner(beside, beside)
        return missing, self._by_number(rest)

    def _weighted(self, pieces: list[dict[int, list[_Piece]]]) -> list[dict[int, list[_Piece]]]:
        """The pieces of all rounds with the weights of tokens in their gates."""
        if not self.path.is_by_token:
            return pieces
        weighted, none_T = [], torch.empty(0, device=self.ranks.device)
        for turn, (route, round_pieces) in enumerate(zip(self.routes, pieces, strict=True)):
            weight_T = self.path.weights[turn] if turn < len(self.path.weights) else none_T
            (weight_N,) = self.ranks.exchange(route.rows(weight_T[:, None]), route.send, route.receive).T
            weighted.append(
                {
                    number: [replace(piece, gate_T=piece.gate_T * weight_N[piece.rows]) for piece in own]
                    for number, own in round_pieces.items()
                }
            )
        return weighted

    def _weight(self, number: int) -> torch.Tensor:
        """Down projection [D, I] of an expert kept."""
        return self.layer.layout.oriented(self.layer.experts[self.layer.kept[number]]["down_proj"])

    def _map(self, function: Callable[[int], T]) -> dict[int, T]:
        """Results of a function for this rank's experts, which run in parallel."""
        return dict(zip(self.mine, self.ranks.workers.map(function, self.mine), strict=True))

    def _is_held_out(self, micro_batch: int) -> bool:
        return self.holds_out and micro_batch % HELD_OUT == HELD_OUT - 1

    def _fitted(self, number: int, turn: int) -> list[_Piece]:
        """Pieces of an expert in a round that are not held out."""
        return [piece for piece in self.pieces[turn][number] if not self._is_held_out(piece.micro_batch)]

    def _factors(self) -> tuple[float, dict[int, torch.Tensor]]:
        """Damping, and Cholesky factors [I, I] of every expert's damped Gram matrix, a diagonal block of the whole problem's."""

        def gram_of(number: int) -> torch.Tensor:
            width = self.change[number].shape[1]
            total_II = torch.zeros(width, width, device=self.ranks.device)
            for turn in range(len(self.routes)):
                for piece in self._fitted(number, turn):
                    total_II += gram(piece.product_TX)
            return total_II

        grams = self._map(gram_of)
        mean = self._by_number({n: float(total_II.diagonal().double().mean()) for n, total_II in grams.items()})
        damping = DAMPING * mean / len(self.layer.kept) or 1.0

        return damping, self._map(lambda number: damped_factor(grams.pop(number), damping))

    def _by_number(self, parts: dict[int, float]) -> float:
        """Sum of numbers of all ranks' experts or micro-batches, in their order."""
        everywhere = {number: part for gathered in self.ranks.gather_objects(parts) for number, part in gathered.items()}
        return math.fsum(everywhere[number] for number in sorted(everywhere))

    def _squared(self, rows: Callable[[int], torch.Tensor], held_out: bool | None) -> float:
        """Sum of squares of the rows [T, D] of all micro-batches, of those held out, or of the others."""
        world, rank = self.ranks.world, self.ranks.rank
        mine = [(turn * world + rank, turn) for turn in range(len(self.missing))]
        chosen = [(batch, turn) for batch, turn in mine if held_out in (None, self._is_held_out(batch))]
        return self._by_number({batch: inner(rows(turn), rows(turn)) for batch, turn in chosen})

    def _outputs(
        self, matrix: Callable[[int], torch.Tensor], replicated: Callable[[Replicated], torch.Tensor]
    ) -> list[torch.Tensor]:
        """Outputs [T, D] of this rank's micro-batches if the experts' down projections are `matrix(number)` [D, I], and of each
        replicated one [D, X] what the other function says."""
        outputs = [self._round(turn, matrix) for turn in range(len(self.routes))][: len(self.missing)]
        for own in self.constants:
            for turn, output_TD in enumerate(outputs):
                output_TD += own.outputs(turn, replicated(own))
        outputs = self.ranks.workers.map(self.path.behind, outputs)
        for own in self.shared:
            for turn, output_TD in enumerate(outputs):
                output_TD += own.outputs(turn, replicated(own))
        return outputs

    def _round(self, turn: int, matrix: Callable[[int], torch.Tensor]) -> torch.Tensor:
        route = self.routes[turn]
        rows_ND = torch.empty(sum(route.receive), self.width, device=self.ranks.device)

        def serve(number: int) -> None:
            matrix_DI = matrix(number)
            for piece in self.pieces[turn][number]:
                rows_ND[piece.rows] = piece.product_TX @ matrix_DI.T

        self._map(serve)
        return route.sums(self.ranks.exchange(rows_ND, route.receive, route.send))

    def gradient(self) -> None:
        for own in self.shared:
            own.gradient(self.missing)
        missing = self.ranks.workers.map(self.path.before, self.missing)
        for own in self.constants:
            own.gradient(missing)
        self.slope = {number: change_DI.mul(-self.damping) for number, change_DI in self.change.items()}
        none_TD = torch.empty(0, self.width, device=self.ranks.device)
        for turn, route in enumerate(self.routes):
            missing_TD = missing[turn] if turn < len(missing) else none_TD
            rows_ND = self.ranks.exchange(route.rows(missing_TD), route.send, route.receive)

            def add(number: int, turn: int = turn, rows_ND: torch.Tensor = rows_ND) -> None:
                for piece in self._fitted(number, turn):
                    self.slope[number].addmm_(rows_ND[piece.rows].T, piece.product_TX)

            self._map(add)

    def precondition(self) -> float:
        def solve(number: int) -> float:
            kept_DI = self._weight(number) != 0  # removed weights stay zero
            slope_DI = self.slope[number]
            self.slope[number] = preconditioned(slope_DI, self.factors[number], kept_DI, self.path.solved)
            return inner(slope_DI, self.slope[number])

        return self._by_number(self._map(solve)) + self._of_replicated(lambda own: own.precondition())

    def _of_replicated(self, products: Callable[[Replicated], torch.Tensor]) -> float:
        """Sum of products of the replicated matrices, the same on every rank."""
        return math.fsum(number for own in self.replicated for number in products(own).sum(1, dtype=torch.float64).tolist())

    def turn(self, share: float) -> None:
        for own in self.replicated:
            own.turn(share)
        self._map(lambda number: self.direction[number].mul_(share).add_(self.slope[number]))

    def curvature(self) -> float:
        self.added.clear()  # before there is another
        self.added = self._outputs(self.direction.__getitem__, lambda own: own.direction)
        size = self._by_number(self._map(lambda number: inner(self.direction[number], self.direction[number])))
        damped = self.damping * size + self._of_replicated(lambda own: own.damping * own.direction.square())
        return self._squared(self.added.__getitem__, False) + damped

    def held_out(self, size: float = 0.0) -> float:
        rows = self.missing.__getitem__ if not size else lambda turn: self.missing[turn] - size * self.added[turn]
        return self._squared(rows, self.holds_out)

    def step(self, size: float) -> None:
        self.is_changed = True
        for own in self.replicated:
            own.step(size)
        self._map(lambda number: self.change[number].add_(self.direction[number], alpha=size))
        for missing_TD, added_TD in zip(self.missing, self.added, strict=True):
            missing_TD.sub_(added_TD, alpha=size)

    def error(self) -> float:
        """Squared error of the outputs once all weights are rounded to what is written. Takes the place of the direction."""
        self.added.clear()
        if not self.is_changed and self.rounding.is_exact and self.path.is_linear:
            return self._squared(self.missing.__getitem__, None) + self.unreachable
        self._map(self._round_off)
        for own in self.replicated:
            own.round_off(partial(self.rounding.shared, self.layer.layout), self.is_changed)
        if not self.path.is_linear:
            return self._error_of_a_run()
        added = self._outputs(self.direction.__getitem__, lambda own: own.direction)
        return self._squared(lambda turn: self.missing[turn] - added[turn], None) + self.unreachable

    def _error_of_a_run(self) -> float:
        """Squared error of the layer's outputs if it had its new weights, which it is given for a run of it."""
        layer, weights = self.layer, [self._weight(number) for number in self.mine]
        saved, rescaled = [weight.clone() for weight in weights], layer.rescaled
        replicated = [own.weight_DX.clone() for own in self.replicated]
        self.install()
        outputs = self.stream.run(layer, self.states).hidden
        layer.rescaled = rescaled
        for weight, before in zip(weights, saved, strict=True):
            weight.copy_(before)
        for own, before in zip(self.replicated, replicated, strict=True):
            own.put(before)
        lacking = [wanted.float() - output.float() for wanted, output in zip(self.dense, outputs, strict=True)]
        return self._squared(lacking.__getitem__, None)

    def _round_off(self, number: int) -> None:
        """Make what rounding adds to an expert's matrix its direction."""
        weight_DI, factor_II = self._weight(number), self.factors[number] if self.is_changed else None
        new_DI = refitted(weight_DI, self.path.unscaled(self.change[number]))
        rounded_DI = self.rounding.closing(self.layer.layout, self.layer.kept[number], new_DI, factor_II)
        self.direction[number].copy_(self.path.scaled(rounded_DI.float() - weight_DI.float()) - self.change[number])

    def install(self) -> None:
        """Give the experts their new weights."""
        self.layer.rescaled = self.rounding.rescaled(self.layer.layout)
        for number in self.mine:
            change_DI = self.change[number] if self.rounding.is_exact else self.change[number] + self.direction[number]
            self._weight(number).copy_(refitted(self._weight(number), self.path.unscaled(change_DI)))
        for own in self.replicated:
            own.install(not self.rounding.is_exact)
