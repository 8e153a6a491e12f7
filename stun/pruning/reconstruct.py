"""Block reconstruction: refits the last matrix of attention and of every MLP and expert to the dense block's output.

The matrices before it are refitted to their own dense outputs when they are pruned (stun.sparsify.refit); the last matrix
corrects the error that remains. With x its inputs in the dense block and z those in the pruned one, for the same tokens, it
takes the values that minimise sum ||W x - V z||^2 over the non-zero entries of V (after arXiv 2510.14444). That needs only the
Gram matrix of z and the sum of x z^T. Experts are weighed with their gate weights, as in the block's output, and compared on
the inputs that the pruned layer gives them.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils._pytree import tree_map

from stun.model.tensor_names import experts_of
from stun.runtime.matmul import product
from stun.sparsify.refit import refit
from stun.statistics.input_moments import Sums, added, gram
from stun.stream.expert_parallel import Exchange, Layer
from stun.stream.layer_stream import LayerStream, States

# Called with a matrix that was solved for, at its place (an expert and a part, or a name), and its inputs' Gram matrix.
Solved = Callable[[tuple[int, str] | str, torch.Tensor, torch.Tensor], None]


class Reconstruction:
    """Copies of a layer's dense weights, taken before it is pruned, and the refit afterwards.

    `names` are the dense matrices to refit, and `inputs` their inputs in the dense layer on this rank, by micro-batch. `blocks`
    are this rank's experts to refit, in the groups that are measured together.
    """

    def __init__(self, stream: LayerStream, layer: Layer, names: list[str], blocks: list[list[int]]):
        self.stream, self.layer, self.blocks = stream, layer, blocks
        self.names = [name for name in names if layer.layout.closes(name)]
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.owners = stream.writer_of(layer.layout)
        self.dense = {name: layer.dense[name].clone() for name in self.names if self.owners[name] == stream.ranks.rank}
        experts = {layer.kept[number]: layer.experts[layer.kept[number]] for block in blocks for number in block}
        self.before = replace(layer, dense={}, experts=tree_map(torch.clone, experts), unused={}, module=None)

    def refit(self, states: States, solved: Solved) -> None:
        """Run the pruned layer once for each block of experts, and refit the matrices that end attention, MLPs and experts;
        `solved(place, weight_OD, gram_DD)` is told of each."""
        stream, layer, ranks = self.stream, self.layer, self.stream.ranks
        stream.build(layer)

        def refit_one(place: tuple[int, str] | str, weight_OD: torch.Tensor, dense_OD: torch.Tensor, pair: dict) -> None:
            weight_OD.copy_(refit(weight_OD, dense_OD, pair["gram"], product(dense_OD.float(), pair["cross"])))
            solved(place, weight_OD, pair["gram"])

        def refit_expert(number: int, pair: dict[str, torch.Tensor]) -> None:
            expert = layer.kept[number]
            ends = [layer.layout.oriented(one.experts[expert]["down_proj"]) for one in (layer, self.before)]
            refit_one((expert, "down_proj"), *ends, pair)

        for place, block in enumerate(self.blocks):
            sums = _Pairs(self, [] if place else self.names, block)
            sums.measure(states)
            ranks.workers.map(lambda entry: refit_expert(*entry), sums.experts.items())
            if not place:
                dense = sums.dense
        ranks.workers.map(lambda entry: refit_one(entry[0], layer.dense[entry[0]], entry[1], dense[entry[0]]), self.dense.items())
        for name in self.names:
            ranks.broadcast(layer.dense[name], self.owners[name])


class _Pairs(Sums):
    """Sums of z z^T and x z^T for the last matrices, with z their inputs in the pruned block and x those in the dense one."""

    reads_gates = True

    def __init__(self, reconstruction: Reconstruction, names: list[str], numbers: list[int]):
        super().__init__(reconstruction.stream, reconstruction.layer, names, numbers)
        self.inputs = reconstruction.inputs
        self.before = Exchange(reconstruction.before, self.stream.ranks, self.stream.dtype)
        named = experts_of(self.layer.module)
        self.module = named[1] if named else None

    def add_expert(self, sums, number, input_nD, inner_nI, gate_n) -> None:
        before_nI = self.before.inner(self.module, number, input_nD)
        for key, part in _pair(inner_nI.float() * gate_n[:, None], before_nI.float() * gate_n[:, None]).items():
            sums[key] = added(sums.get(key), part)

    def of_dense(self, name, turn, input_TD) -> dict[str, torch.Tensor]:
        return _pair(input_TD.flatten(0, -2).float(), self.inputs[name][turn].flatten(0, -2).float())

    def shapes(self, rows, columns):
        return {key: ((columns, columns), torch.float32) for key in ("gram", "cross")}


def _pair(after_TD: torch.Tensor, before_TD: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"gram": gram(after_TD), "cross": before_TD.T @ after_TD}
