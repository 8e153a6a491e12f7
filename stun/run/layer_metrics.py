"""What a stream measures of the layer it holds, each rank of its own part; stun.run.layer_records puts the parts together."""

from __future__ import annotations

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
    """The kind of tensor, of stun.run.layer_records.KINDS, that a source name of a layer stands for."""
    if name in layout.linears:
        return layout.linears[name].name
    return "other" if name in layout.dense or name in layout.unused else "experts"


def parameters_by_kind(arch: Architecture, layout: LayerLayout) -> dict[str, int]:
    """Parameters of a layer in the checkpoint."""
    counts = dict.fromkeys(KINDS, 0)
    for name in {*layout.copied, *(name for expert in layout.experts for names in expert.values() for name in names)}:
        counts[kind_of(layout, name)] += arch.info(name).numel
    return counts


def nonzero_by_kind(layout: LayerLayout, tensors: dict[str, torch.Tensor], workers: Workers) -> dict[str, int]:
    """Non-zero entries of what a rank writes of a layer."""
    counts: Counter[str] = Counter()
    for name, count in zip(tensors, workers.map(lambda own: int(own.count_nonzero()), tensors.values()), strict=True):
        counts[kind_of(layout, name)] += count
    return dict(counts)


def expert_powers(layer: Layer, workers: Workers, without_zeros: bool = False) -> dict:
    """Sums of powers over this rank's experts' matrices."""
    weights = (weight for expert in layer.experts.values() for weight in expert.values() if weight.dim() > 1)
    return power_sums(weights, without_zeros, workers.map)


class WeightPowers:
    """Sums of powers of this rank's part of a layer's matrices, by stage and kind: `dense`, as they are read;
    `experts_left`, once experts have left; `weights_left`, of what is not zero at the end.

    Where experts that leave are not read, the stage `dense` lacks the experts: the first stream has seen them.
    """

    def __init__(self, stream: LayerStream, layer: Layer):
        self.layer, self.workers, owners = layer, stream.ranks.workers, stream.writer_of(layer.layout)
        self.names = [name for name in sorted(layer.layout.linears) if owners[name] == stream.ranks.rank]
        self.stages = {"dense": self._dense_matrices()}
        if len(layer.kept) == layer.layout.num_experts:
            self.stages["dense"]["experts"] = expert_powers(layer, self.workers)

    def experts_left(self, is_changed: bool) -> None:
        """Enter what is there now; `is_changed` says whether experts have left or have other values."""
        own = expert_powers(self.layer, self.workers) if is_changed else self.stages["dense"]["experts"]
        self.stages["experts_left"] = self.stages["dense"] | {"experts": own}

    def weights_left(self) -> None:
        """Enter what is there now."""
        self.stages["weights_left"] = self._dense_matrices(True) | {"experts": expert_powers(self.layer, self.workers, True)}

    def _dense_matrices(self, without_zeros: bool = False) -> dict[str, dict]:
        kinds: dict[str, list[torch.Tensor]] = {}
        for name in self.names:
            kinds.setdefault(kind_of(self.layer.layout, name), []).append(self.layer.dense[name])
        return {kind: power_sums(matrices, without_zeros, self.workers.map) for kind, matrices in kinds.items()}
