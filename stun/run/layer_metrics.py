"""Measurements of a layer in a stream, by each rank of its part; stun.run.layer_records combines the ranks'."""

import math
from collections import Counter

import torch

from stun.model.architecture import Architecture
from stun.model.layer_layout import LayerLayout
from stun.run.kurtosis import power_sums
from stun.run.layer_records import KINDS
from stun.runtime.threads import Workers
from stun.stream.expert_parallel import Layer
from stun.stream.layer_stream import LayerStream


def kind_of(layout: LayerLayout, name: str) -> str:
    """Kind (stun.run.layer_records.KINDS) of a layer's tensor, from its source name."""
    if name in layout.linears:
        return layout.linears[name].name
    return "other" if name in layout.dense or name in layout.unused else "experts"


def parameters_by_kind(arch: Architecture, layout: LayerLayout) -> dict[str, int]:
    """Number of parameters of a layer in the checkpoint, by kind."""
    counts = dict.fromkeys(KINDS, 0)
    for name in {*layout.copied, *(name for expert in layout.experts for names in expert.values() for name in names)}:
        counts[kind_of(layout, name)] += arch.info(name).numel
    return counts


def nonzero_by_kind(stream: LayerStream, layer: Layer) -> dict[str, int]:
    """Number of non-zero entries of a layer's tensors on this rank, those outside the experts where they are written, by kind."""
    ranks, writers = stream.ranks, stream.writer_of(layer.layout)
    tensors = [(kind_of(layer.layout, name), own) for name, own in layer.dense.items() if writers[name] == ranks.rank]
    tensors += [("other", own) for own in layer.unused.values()]
    tensors += [("experts", own) for parts in layer.experts.values() for own in parts.values()]
    tensors += [("experts", own) for own in layer.novices.values() if ranks.is_first]
    counts: Counter[str] = Counter()
    for (kind, _), count in zip(tensors, ranks.workers.map(lambda entry: _nonzero(entry[1]), tensors), strict=True):
        counts[kind] += count
    return dict(counts)


def _nonzero(tensor: torch.Tensor) -> int:
    """Non-zero entries of a tensor; of one of whole numbers, which are no weights, all."""
    return int(tensor.count_nonzero()) if tensor.dtype.is_floating_point else math.prod(tensor.shape)


def expert_powers(layer: Layer, workers: Workers, without_zeros: bool = False) -> dict:
    """Power sums of the matrices of this rank's experts."""
    weights = (weight for expert in layer.experts.values() for weight in expert.values() if weight.dim() > 1)
    return power_sums(weights, without_zeros, workers.map)


class WeightPowers:
    """Power sums of this rank's part of a layer's matrices, by stage and kind: `dense`, as read; `experts_removed`, after experts
    are removed; `weights_removed`, of the non-zero weights after weights are removed.

    If experts to remove are not read, the stage `dense` has no experts: the first stream has measured them.
    """

    def __init__(self, stream: LayerStream, layer: Layer):
        self.layer, self.workers, owners = layer, stream.ranks.workers, stream.writer_of(layer.layout)
        self.names = [name for name in sorted(layer.layout.linears) if owners[name] == stream.ranks.rank]
        self.stages = {"dense": self._dense_matrices()}
        if len(layer.kept) == layer.layout.num_experts:
            self.stages["dense"]["experts"] = expert_powers(layer, self.workers)

    def experts_removed(self, is_changed: bool) -> None:
        """Measure the experts kept; `is_changed` says whether experts were removed or have new values."""
        powers = expert_powers(self.layer, self.workers) if is_changed else self.stages["dense"]["experts"]
        self.stages["experts_removed"] = self.stages["dense"] | {"experts": powers}

    def weights_removed(self) -> None:
        """Measure the non-zero weights of all matrices."""
        self.stages["weights_removed"] = self._dense_matrices(True) | {"experts": expert_powers(self.layer, self.workers, True)}

    def _dense_matrices(self, without_zeros: bool = False) -> dict[str, dict]:
        kinds: dict[str, list[torch.Tensor]] = {}
        for name in self.names:
            kinds.setdefault(kind_of(self.layer.layout, name), []).append(self.layer.dense[name])
        return {kind: power_sums(matrices, without_zeros, self.workers.map) for kind, matrices in kinds.items()}
