"""Constants of novices in the joint refit: outputs of experts that were removed but are still routed to.

They enter the least squares of stun.pruning.joint_refit as one more column an expert, its gate weight. All ranks hold the same
matrices [X, D]; sums over tokens are those of the micro-batches, added in their order.

Shapes: T tokens of a micro-batch, X novices of the layer, D hidden.
"""

from collections.abc import Callable

import torch

from stun.runtime.ranks import Ranks
from stun.sparsify.joint_refit import DAMPING
from stun.stream.expert_parallel import Layer


class Constants:
    """The novices' part of the problem of stun.sparsify.joint_refit; `gates[turn]` are their gate weights [T, X] in this rank's
    micro-batches, and `is_fitted(turn)` says whether one of them is not held out."""

    def __init__(self, layer: Layer, ranks: Ranks, gates: list[torch.Tensor], rounds: int, is_fitted: Callable[[int], bool]):
        self.layer, self.ranks, self.gates, self.rounds, self.is_fitted = layer, ranks, gates, rounds, is_fitted
        self.first_D = next(iter(layer.novices.values()))
        self.change = torch.zeros(len(layer.novices), len(self.first_D), device=ranks.device)
        self.direction, self.slope = torch.zeros_like(self.change), torch.zeros_like(self.change)
        gram_XX = self._sum(lambda turn: gates[turn].T @ gates[turn], len(layer.novices)).double()
        self.damping = DAMPING * float(gram_XX.diagonal().mean()) or 1.0
        gram_XX.diagonal().add_(self.damping)
        (self.factor,) = ranks.workers.map(lambda gram_XX: torch.linalg.cholesky(gram_XX).float(), [gram_XX])

    def _sum(self, part: Callable[[int], torch.Tensor], width: int) -> torch.Tensor:
        """Sum [X, width] over the micro-batches of all ranks that are fitted."""
        total = torch.zeros(len(self.layer.novices), width, device=self.ranks.device)
        for turn in range(self.rounds):
            mine = torch.zeros_like(total)
            if turn < len(self.gates) and self.is_fitted(turn):
                (mine,) = self.ranks.workers.map(part, [turn])
            for rank_part in self.ranks.all_gather(mine):
                total += rank_part
        return total

    def outputs(self, turn: int, matrix_XD: torch.Tensor) -> torch.Tensor:
        """Outputs [T, D] of the novices in a micro-batch if their constants are the rows of a matrix."""
        return self.ranks.workers.map(lambda turn: self.gates[turn] @ matrix_XD, [turn])[0]

    def gradient(self, missing: list[torch.Tensor]) -> None:
        self.slope = self._sum(lambda turn: self.gates[turn].T @ missing[turn], self.change.shape[1])
        self.slope.sub_(self.change, alpha=self.damping)

    def precondition(self) -> torch.Tensor:
        """Products [X, D] of the gradient and the preconditioned gradient, entry by entry."""
        slope_XD = self.slope
        (self.slope,) = self.ranks.workers.map(lambda slope_XD: torch.cholesky_solve(slope_XD, self.factor), [slope_XD])
        return slope_XD * self.slope

    def turn(self, share: float) -> None:
        self.direction.mul_(share).add_(self.slope)

    def step(self, size: float) -> None:
        self.change.add_(self.direction, alpha=size)

    @property
    def refitted(self) -> torch.Tensor:
        """Constants [X, D] with their change, in the dtype that they are stored in."""
        return (torch.stack(list(self.layer.novices.values())).float() + self.change).to(self.first_D.dtype)

    @property
    def rounding(self) -> torch.Tensor:
        """What rounding to that dtype adds to the constants [X, D]."""
        return self.refitted.float() - torch.stack(list(self.layer.novices.values())).float() - self.change

    def install(self) -> None:
        """Give the novices their new constants."""
        self.layer.novices.update(zip(self.layer.novices, self.refitted, strict=True))
