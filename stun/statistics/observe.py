"""First stream: one forward of the dense model over the calibration tokens, which collects the statistics of its experts."""

import time
from collections.abc import Callable

import torch

from stun.model.architecture import Architecture
from stun.run.layer_metrics import expert_powers
from stun.run.recorder import Recorder
from stun.runtime.ranks import Ranks
from stun.statistics.accumulators import CoActivation, OutputPowers, norms, weight_sums
from stun.statistics.outliers import OutlierCounter
from stun.statistics.output_sums import OutputSums
from stun.statistics.router import router_distance
from stun.stream.expert_parallel import Layer, Observer
from stun.stream.layer_stream import LayerStream, States, even_owners
from stun.stream.progress import Progress


class Watcher(Observer):
    """Observer that collects one layer's statistics; `sources[m]` is the calibration source of micro-batch m."""

    def __init__(self, num_experts: int, sources: list[int], ranks: Ranks):
        shape = (max(sources, default=0) + 1, num_experts, ranks.device)
        self.sources, self.ranks = sources, ranks
        self.coactivation, self.powers = CoActivation(*shape), OutputPowers(*shape)
        empty_TK = torch.zeros(0, 1, dtype=torch.int64, device=ranks.device)
        self._no_sums_EX = self.powers.reduce(empty_TK, empty_TK, empty_TK)

    def routed(self, micro_batch, index_TK, weights_TK) -> None:
        self._routed = (self.sources[micro_batch], index_TK, weights_TK)
        self._norm_TK = weights_TK.new_empty(index_TK.shape, dtype=torch.float32)

    def combined(self, tokens, output_tKD) -> None:
        self._norm_TK[tokens] = norms(output_tKD)

    def round_ends(self, turn) -> None:
        first, sums_EX = turn * self.ranks.world, self._no_sums_EX
        if first + self.ranks.rank < len(self.sources):
            source, index_TK, gate_TK = self._routed
            self.coactivation.add(source, index_TK)
            sums_EX = self.powers.reduce(index_TK, gate_TK, self._norm_TK)
        self._routed = self._norm_TK = None
        # In the order of micro-batches, whichever rank ran them: a float64 sum depends on its order.
        for source, rank_EX in zip(self.sources[first:], self.ranks.all_gather(sums_EX), strict=False):
            self.powers.add(source, rank_EX)

    def totals(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Statistics of the layer over all ranks. An expert's sums of weights are non-zero on one rank only: adding is exact."""
        ranks = self.ranks
        weights_E3 = torch.zeros(len(layer.kept), 3, dtype=torch.float64)
        sums = ranks.workers.map(lambda expert: weight_sums(list(expert.values())), layer.experts.values())
        for number, expert_sums in zip(layer.experts, sums, strict=True):
            weights_E3[number] = torch.tensor(expert_sums, dtype=torch.float64)
        return {
            "router_distance": router_distance(layer.dense[layer.layout.router].float()),
            "coactivation": ranks.sum_integers(self.coactivation.counts_SEE),
            "powers": self.powers.sums_SE33,
            "peak": self.powers.peak_SE,
            "weights": ranks.all_gather(weights_E3.to(ranks.device)).sum(0),
        }


def observe(
    arch: Architecture,
    states: States,
    recorder: Recorder,
    save: Callable[[int, dict[str, torch.Tensor]], None],
    sources: list[int],
    outliers: bool = False,
    sums_outputs: bool = False,
) -> None:
    """Run the dense model layer by layer and call `save(layer, statistics)` on the first rank: for every layer with experts, or
    for every layer if `outliers` among the scores are counted. An interrupted stream is resumed.

    `sources` has the calibration source of every micro-batch. stun.statistics.store describes the statistics; two of them are
    taken on request only (hence seven parameters).
    """
    ranks, finished = recorder.ranks, recorder.finished()
    states = recorder.restore(finished, states)
    owners = [even_owners(layout, ranks.world) for layout in arch.layers]
    stream = LayerStream(arch, ranks, arch.layers, owners, len(finished))
    progress = Progress("observe", len(arch.layers), ranks, len(finished), step=0)
    for layer in stream:
        ranks.doing = f"observe layer {layer.layout.index}"
        ranks.meter.enter("observe")
        watcher = Watcher(layer.layout.num_experts, sources, ranks) if layer.kept else None
        outputs = OutputSums(stream, layer, sources) if layer.kept and sums_outputs else None
        watchers = [observer for observer in (watcher, outputs) if observer]
        stream.build(layer)
        start = time.perf_counter()
        if outliers:
            counter = OutlierCounter(stream, layer)
            states = counter.run(states, *watchers)
        else:
            states = stream.run(layer, states, *watchers)
        totals = watcher.totals(layer) if watcher else {}
        totals |= {"outputs": outputs.totals()[0].float()} if outputs else {}
        totals |= counter.totals() if outliers else {}
        powers = {"dense": {"experts": expert_powers(layer, ranks.workers)}}
        layer.seconds["compute"] = time.perf_counter() - start
        if ranks.is_first and totals:
            save(layer.layout.index, {name: tensor.cpu().contiguous() for name, tensor in totals.items()})
        entry = {"seconds": dict(layer.seconds), "peak_bytes": ranks.lap_memory(), "powers": powers}
        ranks.meter.enter("write wait")
        layer.seconds["write"] = recorder.wait()
        # Before the record, so that every layer on disk has its line in the log.
        progress.layer(layer, f"experts {len(layer.kept)}", experts=len(layer.kept))
        recorder.layer(layer.layout.index, states, entry)
    recorder.close()
    progress.close()
