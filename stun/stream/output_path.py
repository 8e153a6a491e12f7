"""Path from a layer's experts to its output, found by running the layer.

Most layers add the output o of their experts to the hidden states, some of them times a number. With residual streams
(DeepSeek-V4) each token has a factor for each stream; in a latent space (Nemotron-H) a matrix W stands behind the experts; and
some layers normalise what they add (Gemma 4): as long as each token is divided by what it is divided by now, that is a factor of
the token and a gain of each channel. In all, a change of o changes the layer's output h by

    dh[t, s] = factor[t, s] * gain * (W do[t]).

Shapes: T tokens of a micro-batch, S residual streams, D hidden, L an expert's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from stun.config import StunError
from stun.model.tensor_names import experts_of
from stun.sparsify.joint_refit import DAMPING, damped_factor
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream, States

# Factor of what is added that lets it stand out of the hidden states, whose dtype rounds the sum of both; float16 ends at 65,504.
_LOUD, _LOUD_HALF = 64.0, 8.0
# Largest part of a change, by its length, that the path may leave out: of all tokens, or of half of them where each has a factor.
REST = 0.05
_LEAST_GAIN = 1e-3  # of the mean: a channel with less of the experts' output is left alone


@dataclass(frozen=True)
class OutputPath:
    """What a layer does with the output of its experts.

    `scale` is the factor of all tokens. Where each has its own (`is_by_token`), `weights[turn]` [T] are their sizes and
    `shares[turn]` [T, S] what the streams have of them, of length 1, in this rank's micro-batches. `gain_D` and `matrix_DL` are
    None where there are none; `factor_LL` is that of the matrix's damped Gram matrix.
    """

    scale: float = 1.0
    is_by_token: bool = False
    weights: list[torch.Tensor] = field(default_factory=list)
    shares: list[torch.Tensor] = field(default_factory=list)
    gain_D: torch.Tensor | None = None
    matrix_DL: torch.Tensor | None = None
    factor_LL: torch.Tensor | None = None

    @property
    def is_linear(self) -> bool:
        """Whether it stays what it is if the experts' output changes much."""
        return self.gain_D is None

    def along(self, turn: int, difference: torch.Tensor) -> torch.Tensor:
        """The part [T, D] of a difference of outputs in a micro-batch that a change of the experts' could make."""
        if not self.is_by_token:
            return difference.flatten(0, -2)
        return (_by_stream(difference, self.shares[turn]) * self.shares[turn][:, :, None]).sum(1)

    def beside(self, turn: int, difference: torch.Tensor) -> torch.Tensor:
        """The rest [T, S, D] of it."""
        share_TS, along_TD = self.shares[turn], self.along(turn, difference)
        return _by_stream(difference, share_TS) - share_TS[:, :, None] * along_TD[:, None]

    def unscaled(self, change_DX: torch.Tensor) -> torch.Tensor:
        """Change of a matrix whose outputs the gain multiplies, from the change of its product with the gain."""
        if self.gain_D is None:
            return change_DX
        is_heard_D = self.gain_D.abs() > _LEAST_GAIN * self.gain_D.abs().mean()
        return change_DX * torch.where(is_heard_D, 1 / self.gain_D, 0.0)[:, None]

    def scaled(self, change_DX: torch.Tensor) -> torch.Tensor:
        """The reverse."""
        return change_DX if self.gain_D is None else change_DX * self.gain_D[:, None]

    def scaled_rows(self, output_TD: torch.Tensor) -> torch.Tensor:
        """Outputs times the gain."""
        return output_TD if self.gain_D is None else output_TD * self.gain_D

    @property
    def size(self) -> float:
        """Mean square that the matrix gives a number of the experts' output."""
        return 1.0 if self.matrix_DL is None else _mean_square(self.matrix_DL)

    def behind(self, output_TL: torch.Tensor) -> torch.Tensor:
        """The experts' output behind the matrix, [T, D]."""
        return output_TL if self.matrix_DL is None else output_TL @ self.matrix_DL.T

    def before(self, output_TD: torch.Tensor) -> torch.Tensor:
        """Its transpose, [T, L]."""
        return output_TD if self.matrix_DL is None else output_TD @ self.matrix_DL

    def solved(self, slope_LX: torch.Tensor) -> torch.Tensor:
        """A gradient times the inverse of the matrix's own damped Gram matrix."""
        return slope_LX if self.factor_LL is None else torch.cholesky_solve(slope_LX, self.factor_LL)


def _mean_square(matrix_DL: torch.Tensor) -> float:
    """Mean square of the columns' lengths."""
    return inner(matrix_DL, matrix_DL) / matrix_DL.shape[1]


def _by_stream(hidden: torch.Tensor, share_TS: torch.Tensor) -> torch.Tensor:
    """Hidden states [T, S, D] by token and stream."""
    return hidden.reshape(*share_TS.shape, -1)


class PathFinder:
    """Finds the path of a layer: what is watched in one run (`watching`) is compared with others (`path`)."""

    def __init__(self, stream: LayerStream, layer: Layer):
        self.stream, self.layer = stream, layer
        name = layer.layout.output_matrix
        module = layer.module.get_submodule(layer.layout.dense[name].rpartition(".")[0]) if name else None
        self.adds, self.matrix = module or experts_of(layer.module)[1], module  # whose output is added
        self.norms = {path: layer.module.get_submodule(path) for path in stream.arch.norms_behind}
        self.loud = _LOUD_HALF if stream.dtype is torch.float16 else _LOUD
        self.added: list[torch.Tensor] = []
        self.factors: dict[str, list[torch.Tensor]] = {path: [] for path in self.norms}

    def watching(self) -> ExitStack:
        """Context of a run that is recorded: what is added, and what norms multiply each token by."""

        def norm(path: str) -> Callable:
            def seen(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
                plain = _times_gain(module, arguments)
                factor = (plain * output.float()).sum(-1, keepdim=True) / plain.square().sum(-1, keepdim=True).clamp_min(1e-30)
                self.factors[path].append(factor)

            return seen

        hooks = self._on_norms(norm)
        if self.stream.arch.adds_by_token:
            seen = lambda module, arguments, output: self.added.append(output.flatten(0, -2))  # noqa: E731
            hooks.enter_context(self.adds.register_forward_hook(seen))
        return hooks

    def steady_norms(self) -> ExitStack:
        """Context of a run over the same tokens in which norms multiply each of them by what they did in the recorded one."""

        def norm(path: str) -> Callable:
            factors = iter(self.factors[path])
            return lambda module, arguments, output: (_times_gain(module, arguments) * next(factors)).to(output.dtype)

        return self._on_norms(norm)

    def _on_norms(self, hook: Callable[[str], Callable]) -> ExitStack:
        """Context in which every norm has the hook of its path."""
        hooks = ExitStack()
        for path, module in self.norms.items():
            hooks.enter_context(module.register_forward_hook(hook(path)))
        return hooks

    def louder(self, states: States, factor: float) -> list[torch.Tensor]:
        """Hidden states after the layer if what is added is so many times as large."""
        with self.adds.register_forward_hook(lambda module, arguments, output: output * factor), self.steady_norms():
            return self.stream.run(self.layer, states).hidden

    def path(self, states: States, outputs: list[torch.Tensor]) -> OutputPath:
        """The path, from the recorded run that gave `outputs`. All ranks call this together. Raises StunError if the layer does
        more than that with the output of its experts."""
        latent = self._latent()
        if not self.stream.arch.adds_by_token:
            return OutputPath(self._scale(states), **latent)
        gains = [module.weight.float() for module in self.norms.values()]
        gain_D = torch.stack(gains).prod(0) if gains else None
        weights, shares, heard = [], [], []
        for loud, plain, added_TD in zip(self.louder(states, self.loud), outputs, self.added, strict=True):
            base_TD = added_TD.float() if gain_D is None else added_TD.float() * gain_D
            change_TSD = ((loud.float() - plain.float()) / (self.loud - 1)).reshape(len(base_TD), -1, base_TD.shape[1])
            factor_TS = (change_TSD * base_TD[:, None]).sum(2) / base_TD.square().sum(1, keepdim=True).clamp_min(1e-30)
            rest_TSD = change_TSD - factor_TS[:, :, None] * base_TD[:, None]
            # A token whose hidden state is so much larger that rounding it hides the change does not count.
            is_heard_T = rest_TSD.square().sum((1, 2)) <= REST**2 * change_TSD.square().sum((1, 2))
            heard += is_heard_T.tolist()
            factor_TS = factor_TS * is_heard_T[:, None]
            weights.append(factor_TS.square().sum(1).sqrt())
            shares.append(factor_TS / weights[-1][:, None].clamp_min(1e-30))
        everywhere = [is_heard for own in self.stream.ranks.gather_objects(heard) for is_heard in own]
        if 2 * sum(everywhere) < len(everywhere):
            raise self._refused()
        return OutputPath(1.0, True, weights, shares, gain_D, **latent)

    def _latent(self) -> dict[str, torch.Tensor]:
        """The matrix behind the experts, if there is one, and the factor of its damped Gram matrix, as fields of the path."""
        if self.matrix is None:
            return {}
        matrix_DL = self.matrix.weight.float()
        factor = lambda own_DL: damped_factor(own_DL.T @ own_DL, DAMPING * _mean_square(own_DL))  # noqa: E731
        return {"matrix_DL": matrix_DL, "factor_LL": self.stream.ranks.workers.map(factor, [matrix_DL])[0]}

    def _scale(self, states: States) -> float:
        """Factor of what is added, found on the first round of micro-batches."""
        ranks, first = self.stream.ranks, states.first(self.stream.ranks.world)
        seen: list[torch.Tensor] = []
        with self.adds.register_forward_hook(lambda module, arguments, output: seen.append(output)):
            loud, silent = self.louder(first, self.loud), self.louder(first, 0.0)
        found = None
        if ranks.is_first:
            change_TD = ((loud[0].float() - silent[0].float()) / self.loud).flatten(0, -2)
            output_TD, found = seen[0].float().flatten(0, -2), (0.0, False)
            if output_TD.shape == change_TD.shape:
                scale = inner(output_TD, change_TD) / (inner(output_TD, output_TD) or 1.0)
                found = (scale, _is_small(change_TD - scale * output_TD, change_TD))
        scale, is_added = ranks.broadcast_object(found)
        if not is_added or not math.isfinite(scale) or scale == 0:
            raise self._refused()
        return scale

    def _refused(self) -> StunError:
        where = f"layer {self.layer.layout.index} does more with the output of its experts than to add it"
        return StunError(f"experts.refit=true: {where}; use experts.refit=false")


def _times_gain(norm: nn.Module, arguments: tuple) -> torch.Tensor:
    """What a norm is given, times its weight."""
    return arguments[0].float() * norm.weight.float()


def _is_small(rest: torch.Tensor, change: torch.Tensor) -> bool:
    return inner(rest, rest) <= REST**2 * inner(change, change)


def inner(left: torch.Tensor, right: torch.Tensor) -> float:
    """Inner product in float64: over each row, then over the rows, which no number of threads changes."""
    return math.fsum((left * right).flatten(0, -2).sum(1, dtype=torch.float64).tolist())
