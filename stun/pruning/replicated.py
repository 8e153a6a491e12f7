"""Matrices of the joint refit that all ranks hold: constants of novices, and the down projections of shared experts.

They are further columns of the least squares in stun.pruning.joint_refit. Each rank has the inputs of its own tokens; sums over
tokens are those of the micro-batches of all ranks, added in their order, so that every rank computes the same.

Shapes: T tokens of a micro-batch, X inputs of a matrix (for constants: one a novice, its gate weight), D hidden.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch

from stun.config import StunError
from stun.runtime.ranks import Ranks
from stun.sparsify.joint_refit import DAMPING, damped_factor, preconditioned, refitted
from stun.statistics.input_moments import gram
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream, States
from stun.stream.output_path import REST, OutputPath

_LOUD = 16.0  # factor of a shared expert's output that lets it stand out of the hidden states


@dataclass(frozen=True)
class Gated:
    """Inputs of a matrix for some tokens, and what its outputs are multiplied by before they are added."""

    inner_TX: torch.Tensor
    gate_T: torch.Tensor

    @property
    def product_TX(self) -> torch.Tensor:
        return self.inner_TX.float() * self.gate_T[:, None]


class Replicated:
    """A matrix [D, X] of the problem of stun.sparsify.joint_refit.

    `inputs[turn]` are its inputs in this rank's micro-batches, and `is_fitted[turn]` says whether one of them is not held out;
    `put` gives the layer another matrix, and `path` is what the layer does with its experts' output. One with a `name` is the
    source's, of a shared expert: its zeros are removed weights, which are kept zero, and it is rounded to what is written.
    """

    def __init__(
        self,
        weight_DX: torch.Tensor,
        inputs: list[Gated],
        put: Callable[[torch.Tensor], None],
        path: OutputPath,
        name: str = "",
    ):
        self.weight_DX, self.inputs, self.put, self.path, self.name = weight_DX, inputs, put, path, name
        self.kept_DX = weight_DX != 0 if name else torch.ones_like(weight_DX, dtype=torch.bool)
        self.change = torch.zeros_like(weight_DX, dtype=torch.float32)
        self.direction, self.slope = torch.zeros_like(self.change), torch.zeros_like(self.change)

    def prepare(self, ranks: Ranks, rounds: int, is_fitted: list[bool]) -> None:
        """Set damping and preconditioner, from the inputs of all ranks in so many rounds."""
        self.ranks, self.rounds, self.is_fitted = ranks, rounds, is_fitted
        width = self.change.shape[1]
        gram_XX = self._sum(lambda turn: gram(self.inputs[turn].product_TX), (width, width))
        self.damping = DAMPING * float(gram_XX.diagonal().double().mean()) or 1.0
        (self.factor_XX,) = ranks.workers.map(lambda gram_XX: damped_factor(gram_XX, self.damping), [gram_XX])
        self.damping *= 1.0 if self.name else self.path.size

    def _sum(self, part: Callable[[int], torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """Sum over the micro-batches of all ranks that are fitted, in their order."""
        total = torch.zeros(shape, device=self.ranks.device)
        for turn in range(self.rounds):
            mine = torch.zeros_like(total)
            if turn < len(self.inputs) and self.is_fitted[turn]:
                (mine,) = self.ranks.workers.map(part, [turn])
            for rank_part in self.ranks.all_gather(mine):
                total += rank_part
        return total

    def outputs(self, turn: int, matrix_DX: torch.Tensor) -> torch.Tensor:
        """What a matrix in place of this one adds to the outputs [T, D] of a micro-batch."""
        return self.ranks.workers.map(lambda turn: self.inputs[turn].product_TX @ matrix_DX.T, [turn])[0]

    def gradient(self, missing: list[torch.Tensor]) -> None:
        self.slope = self._sum(lambda turn: missing[turn].T @ self.inputs[turn].product_TX, self.change.shape)
        self.slope.sub_(self.change, alpha=self.damping)

    def precondition(self) -> torch.Tensor:
        """Products [D, X] of the gradient and the preconditioned gradient, entry by entry."""
        slope_DX = self.slope
        left = None if self.name else self.path.solved  # shared experts work beside the latent space
        (self.slope,) = self.ranks.workers.map(lambda own: preconditioned(own, self.factor_XX, self.kept_DX, left), [slope_DX])
        return slope_DX * self.slope

    def turn(self, share: float) -> None:
        self.direction.mul_(share).add_(self.slope)

    def step(self, size: float) -> None:
        self.change.add_(self.direction, alpha=size)

    def round_off(self, rounded: Callable[..., torch.Tensor], is_fitted: bool) -> None:
        """Make what rounding adds to the refitted matrix the direction; `rounded(name, matrix, factor)` gives what one of the
        source's becomes, fitted to its inputs if there is a factor."""
        new_DX = refitted(self.weight_DX, self.path.unscaled(self.change))
        new_DX = rounded(self.name, new_DX, self.factor_XX if is_fitted else None) if self.name else new_DX
        self.direction.copy_(self.path.scaled(new_DX.float() - self.weight_DX.float()) - self.change)

    def install(self, is_rounded: bool) -> None:
        """Give the layer the refitted matrix, with what rounding adds if it `is_rounded`."""
        change_DX = self.change + self.direction if is_rounded else self.change
        self.put(refitted(self.weight_DX, self.path.unscaled(change_DX)))


def constants(layer: Layer, gates: list[torch.Tensor], path: OutputPath) -> list[Replicated]:
    """The constants of a layer's novices, whose gate weights [T, X] in this rank's micro-batches are `gates`."""
    if not layer.novices:
        return []

    def put(matrix_DX: torch.Tensor) -> None:
        layer.novices.update(zip(layer.novices, matrix_DX.T.contiguous(), strict=True))

    weights = path.weights if path.is_by_token else [torch.ones_like(gates_TX[:, 0]) for gates_TX in gates]
    inputs = [Gated(gates_TX, weight_T) for gates_TX, weight_T in zip(gates, weights, strict=True)]
    return [Replicated(torch.stack(list(layer.novices.values()), 1), inputs, put, path)]


class Shared:
    """The matrices that close a layer's shared experts, with their inputs and outputs while the layer runs."""

    def __init__(self, layer: Layer):
        self.layer, layout = layer, layer.layout
        paths = {name: layout.dense[name].rpartition(".")[0] for name in layout.shared_outputs}
        self.modules = {name: layer.module.get_submodule(path) for name, path in paths.items()}
        self._inputs: dict[str, list[torch.Tensor]] = {name: [] for name in self.modules}
        self._outputs: dict[str, list[torch.Tensor]] = {name: [] for name in self.modules}

    def run(self, stream: LayerStream, states: States, *observers) -> list[torch.Tensor]:
        """Hidden states after the layer, whose shared experts are watched."""

        def watch(name: str):
            def seen(module, arguments, output_TD) -> None:
                self._inputs[name].append(arguments[0].flatten(0, -2))
                self._outputs[name].append(output_TD.flatten(0, -2))

            return seen

        with ExitStack() as hooks:
            for name, module in self.modules.items():
                hooks.enter_context(module.register_forward_hook(watch(name)))
            return stream.run(self.layer, states, *observers).hidden

    def replicated(
        self,
        stream: LayerStream,
        states: States,
        outputs: list[torch.Tensor],
        path: OutputPath,
        steady_norms: Callable[[], AbstractContextManager],
    ) -> list[Replicated]:
        """The matrices. Their outputs' factor, a number for every token, is found by a run in which they are louder than in
        the one that gave `outputs`, with the norms of that one; it is relative to that of the routed experts. Raises StunError
        if there is none."""
        found = []
        for name, module in self.modules.items():
            with module.register_forward_hook(lambda module, arguments, output: output * _LOUD), steady_norms():
                loud = stream.run(self.layer, states).hidden
            gates, is_added = self._factors(loud, outputs, path, name)
            if not all(stream.ranks.gather_objects(is_added)):
                raise StunError(f"experts.refit=true: the layer does more with {name} than to add it; use experts.refit=false")

            def put(
                matrix_DX: torch.Tensor, weight: torch.Tensor = self.layer.dense[name], own: torch.nn.Module = module
            ) -> None:
                weight.copy_(matrix_DX)
                own.weight.copy_(matrix_DX)

            inputs = [Gated(inner, gate_T / path.scale) for inner, gate_T in zip(self._inputs[name], gates, strict=True)]
            found.append(Replicated(self.layer.dense[name], inputs, put, path, name))
        return found

    def _factors(
        self, loud: list[torch.Tensor], outputs: list[torch.Tensor], path: OutputPath, name: str
    ) -> tuple[list[torch.Tensor], bool]:
        """Factor of every token in this rank's micro-batches, and whether the output is multiplied by it and added."""
        factors, is_added = [], True
        for turn, (louder, plain, own_TD) in enumerate(zip(loud, outputs, self._outputs[name], strict=True)):
            change, own_TD = (louder.float() - plain.float()) / (_LOUD - 1), path.scaled_rows(own_TD.float())
            change_TD = path.along(turn, change)
            factor_T = (change_TD * own_TD).sum(1) / own_TD.square().sum(1).clamp_min(1e-30)
            rest = float((change_TD - factor_T[:, None] * own_TD).square().sum())
            if path.is_by_token:
                rest += float(path.beside(turn, change).square().sum())
            is_added = is_added and rest <= REST**2 * float(change.square().sum())
            factors.append(factor_T)
        return factors, is_added
