"""Sums of the experts' outputs, each times its squared gate weight.

An expert's output f = W h + b is linear in its inner state h, so its owner needs to add up but I numbers a token: sum g^2 f =
W sum g^2 h + b sum g^2. Divided by sum g^2 it is the constant that stands best for the expert (MoNE, arXiv 2507.00390).

Shapes: S calibration sources, E experts, D hidden, I expert width, n tokens of one expert.
"""

from collections import defaultdict

import torch

from stun.stream.expert_parallel import Layer, Observer
from stun.stream.layer_stream import LayerStream

_WEIGHTS = 1 << 22  # of a matrix are in float32 at once


class OutputSums(Observer):
    """Observer that sums g^2 h and g^2 of this rank's experts by calibration source, in float64, in the order of the
    micro-batches; `sources[m]` is the source of micro-batch m."""

    reads_gates = True

    def __init__(self, stream: LayerStream, layer: Layer, sources: list[int]):
        self.stream, self.layer, self.sources = stream, layer, sources
        self._sums: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = defaultdict(dict)  # by expert and source

    def expert(self, expert, micro_batch, input_nD, inner_nI, gate_n) -> None:
        square_n, source = gate_n.square(), self.sources[micro_batch]
        new = (square_n @ inner_nI.float()).double(), square_n.sum(dtype=torch.float64)
        known = self._sums[expert].get(source)
        self._sums[expert][source] = new if known is None else (known[0] + new[0], known[1] + new[1])

    def totals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums [S, E, D] of g^2 f and [S, E] of g^2 over all ranks, in float64. An expert's are non-zero on one rank only: adding
        is exact."""
        ranks, layer, width = self.stream.ranks, self.layer, self.layer.layout.width
        count = max(self.sources, default=0) + 1
        outputs_SED = torch.zeros(count, len(layer.kept), width, dtype=torch.float64, device=ranks.device)
        gates_SE = torch.zeros(count, len(layer.kept), dtype=torch.float64, device=ranks.device)

        def add(number: int) -> None:
            for source, (inner_I, gates) in self._sums[number].items():
                outputs_SED[source, number], gates_SE[source, number] = self._output(number, inner_I, gates), gates

        ranks.workers.map(add, list(self._sums))
        return ranks.all_gather(outputs_SED).sum(0), ranks.all_gather(gates_SE).sum(0)

    def constants(self) -> torch.Tensor:
        """The constant [E, D] that stands best for each expert, zero for one without tokens."""
        outputs_SED, gates_SE = self.totals()
        gates_E = gates_SE.sum(0)
        return (outputs_SED.sum(0) / torch.where(gates_E > 0, gates_E, 1.0)[:, None]).float()

    def _output(self, number: int, inner_I: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """W sum g^2 h + b sum g^2, [D]."""
        parts = self.layer.experts[self.layer.kept[number]]
        weight_DI, bias = self.layer.layout.oriented(parts["down_proj"]), parts.get("down_proj_bias")
        blocks = weight_DI.split(max(1, _WEIGHTS // weight_DI.shape[1]))
        output_D = torch.cat([block_dI.float() @ inner_I.float() for block_dI in blocks]).double()
        return output_D if bias is None else output_D + gates * bias.double()
