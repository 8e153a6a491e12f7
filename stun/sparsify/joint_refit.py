"""Least-squares refit of many matrices at once, by conjugate gradients that held-out data stop."""

from collections.abc import Callable
from typing import Protocol

import torch

STEPS = 8  # most steps; on a trained model they came within 3 % of the exact solution's error
FEW_STEPS = 3  # of candidates, which they order as more steps do
DAMPING = 1e-3  # of the mean square of an input, added to every input's


def held_bytes(shape_DI: tuple[int, int], matrices: int, tokens: int, rows: int, itemsize: int) -> int:
    """Bytes of a problem with as many matrices [D, I]: inner states of all `rows` (tokens times the matrices of each), what is
    missing in the outputs of all `tokens` and what a step adds there, a change, a direction, a slope and a factor a matrix."""
    height, width = shape_DI
    return rows * width * itemsize + 8 * tokens * height + 4 * matrices * (3 * height * width + width**2)


def replicated_bytes(shape_DX: tuple[int, int], tokens: int, itemsize: int, world: int) -> int:
    """Bytes of a matrix [D, X] that all ranks hold: inputs of all `tokens` of a rank, a change, a direction, a slope, what a sum
    over the ranks gathers, and a factor."""
    height, width = shape_DX
    return tokens * width * itemsize + 4 * ((4 + world) * height * width + 2 * width**2)


def damped_factor(gram_II: torch.Tensor, damping: float) -> torch.Tensor:
    """Cholesky factor [I, I] of a Gram matrix with damping on its diagonal, in float32."""
    total_II = gram_II.double()  # float32 could find a matrix with one large input to be indefinite
    total_II.diagonal().add_(damping)
    return torch.linalg.cholesky(total_II).float()


def preconditioned(
    slope_DI: torch.Tensor,
    factor_II: torch.Tensor,
    kept_DI: torch.Tensor,
    from_left: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The gradient of a matrix times the inverse of its own damped Gram matrix, and from the left by another one's, if any; both
    are zero, `slope_DI` in place, where `kept_DI` is false."""
    solved_DI = torch.cholesky_solve(slope_DI.mul_(kept_DI).T, factor_II).T
    return (from_left(solved_DI) if from_left else solved_DI).mul(kept_DI)


def refitted(weight: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """A matrix with its change, in the dtype that it is stored in."""
    return (weight.float() + change).to(weight.dtype)


class Problem(Protocol):
    """Matrices X that minimise |R - F X|^2 + damping * |X|^2: R is what is missing in some outputs, and F X what a change X of
    the matrices adds to them. X starts at zero. The problem holds X, the direction P of the next step, and the gradient."""

    def gradient(self) -> None:
        """Set the gradient F^T R - damping * X, over the rows that are not held out."""

    def precondition(self) -> float:
        """Inner product of the gradient and the preconditioned gradient."""

    def turn(self, share: float) -> None:
        """P = preconditioned gradient + share * P."""

    def curvature(self) -> float:
        """|F P|^2 + damping * |P|^2 over the rows that are not held out."""

    def held_out(self, size: float = 0.0) -> float:
        """|R - size * F P|^2 over the rows that are held out."""

    def step(self, size: float) -> None:
        """X += size * P and R -= size * F P."""


def descend(problem: Problem, steps: int) -> int:
    """Take steps until the error of the held-out rows rises; returns their number.

    Stopping there does what a well chosen damping would: few calibration tokens determine few directions, and these come first.
    """
    problem.gradient()
    product, share, error = problem.precondition(), 0.0, problem.held_out()
    for taken in range(steps):
        if product <= 0:
            return taken
        problem.turn(share)
        size = product / problem.curvature()
        now = problem.held_out(size)
        if not now < error:
            return taken
        problem.step(size)
        problem.gradient()
        before, product, error = product, problem.precondition(), now
        share = product / before
    return steps
