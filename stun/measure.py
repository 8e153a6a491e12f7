"""What a stream measures of the layer it holds, each rank of its own part; stun.records puts the parts together."""

from __future__ import annotations

from collections import Counter

import torch

from stun.arch import Architecture
from stun.layout import LayerLayout
from stun.powers import power_sums
from stun.records import KINDS
from stun.stream import Layer, LayerStream


def kind_of(layout: LayerLayout, name: str) -> str:
    """The kind of tensor, of stun.records.KINDS, that a source name of a layer stands for."""
    if name in layout.linears:
        return layout.linears[name].name
    return "other" if name in layout.dense or name in layout.unused else "experts"


def parameters_by_kind(arch: Architecture, layout: LayerLayout) -> dict[str, int]:
    """Parameters of a layer in the checkpoint."""
    counts = dict.fromkeys(KINDS, 0)
    for name in {*layout.copied, *(name for expert in layout.experts for names in expert.values() for name in names)}:
        counts[kind_of(layout, name)] += arch.info(name).numel
    return counts


def nonzero_by_kind(layout: LayerLayout, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Non-zero entries of what a rank writes of a layer."""
    counts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        counts[kind_of(layout, name)] += int(tensor.count_nonzero())
    return dict(counts)


def expert_powers(layer: Layer, without_zeros: bool = False) -> dict:
    """Sums of powers over this rank's experts' matrices."""
    weights = (weight for expert in layer.experts.values() for weight in expert.values() if weight.dim() > 1)
    return power_sums(weights, without_zeros)


class WeightPowers:
    """Sums of powers of this rank's part of a layer's matrices, by stage and kind: `dense`, as they are read;
    `experts_left`, once experts have left; `weights_left`, of what is not zero at the end.

    Where experts that leave are not read, the stage `dense` lacks the experts: the first stream has seen them.
    """

    def __init__(self, stream: LayerStream, layer: Layer):
        self.layer, owners = layer, stream.writer_of(layer.layout)
        self.names = [name for name in sorted(layer.layout.linears) if owners[name] == stream.ranks.rank]
        self.stages = {"dense": self._dense_matrices()}
        if len(layer.kept) == layer.layout.num_experts:
            self.stages["dense"]["experts"] = expert_powers(layer)

    def experts_left(self, is_changed: bool) -> None:
        """Enter what is there now; `is_changed` says whether experts have left or have other values."""
        own = expert_powers(self.layer) if is_changed else self.stages["dense"]["experts"]
        self.stages["experts_left"] = self.stages["dense"] | {"experts": own}

    def weights_left(self) -> None:
        """Enter what is there now."""
        self.stages["weights_left"] = self._dense_matrices(True) | {"experts": expert_powers(self.layer, True)}

    def _dense_matrices(self, without_zeros: bool = False) -> dict[str, dict]:
        kinds: dict[str, list[torch.Tensor]] = {}
        for name in self.names:
            kinds.setdefault(kind_of(self.layer.layout, name), []).append(self.layer.dense[name])
        return {kind: power_sums(matrices, without_zeros) for kind, matrices in kinds.items()}
