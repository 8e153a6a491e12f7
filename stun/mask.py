"""Single weights of one layer: measure what its matrices see, and zero what its quota asks for."""

from __future__ import annotations

from collections import defaultdict

import torch

from stun.budget import LayerQuota
from stun.config import StunError
from stun.ranks import Ranks
from stun.sparsify import require_finite, smallest_per_row, wanda_scores
from stun.stats import squared_sum
from stun.stream import Layer, LayerStream, States


class _Moments:
    """Collects, for every matrix of a layer, the sum of squares of each column of its inputs."""

    def __init__(self, layer: Layer):
        self.experts: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        self.tokens = torch.zeros(len(layer.kept), dtype=torch.int64)
        self.dense: dict[str, list[torch.Tensor]] = defaultdict(list)

    def routed(self, micro_batch, index_TK, output_TKD) -> None:
        pass

    def expert(self, micro_batch, expert, input_nD, inner_nI, output_nD, gate_n) -> None:
        self.tokens[expert] += len(input_nD)
        for part, rows in (("gate_up_proj", input_nD), ("down_proj", inner_nI)):
            add, own = squared_sum(rows), self.experts[expert]
            own[part] = own[part] + add if part in own else add

    def hook(self, name: str):
        """A forward pre-hook that records one micro-batch's inputs of the linear module whose weight is `name`."""
        return lambda module, arguments: self.dense[name].append(squared_sum(arguments[0].flatten(0, -2)))


def _measure(stream: LayerStream, layer: Layer, states: States, names: list[str]) -> _Moments:
    """Run the layer once for its moments; its outputs are discarded, since its weights are about to change."""
    moments = _Moments(layer)
    modules = {name: layer.module.get_submodule(layer.layout.dense[name].rpartition(".")[0]) for name in names}
    hooks = [module.register_forward_pre_hook(moments.hook(name)) for name, module in modules.items()]
    stream.run(layer, states, moments)
    for hook in hooks:
        hook.remove()
    for name in names:
        if len(moments.dense[name]) != len(states.hidden):
            raise StunError(
                f"{name}: ran {len(moments.dense[name])} times in {len(states.hidden)} micro-batches; its inputs are not known"
            )
    return moments


def _sum_over_micro_batches(partial: list[torch.Tensor], states: States, ranks: Ranks, width: int) -> torch.Tensor:
    """[D] total of the micro-batches of all ranks, added in their order."""
    turns = -(-states.total // ranks.world)
    own_MD = torch.zeros(turns, width, dtype=torch.float64, device=ranks.device)
    for turn, row_D in enumerate(partial):
        own_MD[turn] = row_D
    return ranks.all_gather(own_MD).transpose(0, 1).reshape(-1, width)[: states.total].sum(0)


def _pooled(moments: _Moments, layer: Layer, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The layer's moments over all experts, the stand-in for an expert that saw no token; added in expert order."""
    own = {expert: {part: row.cpu() for part, row in parts.items()} for expert, parts in moments.experts.items()}
    everyone = {expert: parts for gathered in ranks.gather_objects(own) for expert, parts in gathered.items()}
    pooled: dict[str, torch.Tensor] = {}
    for expert in sorted(everyone):
        for part, row in everyone[expert].items():
            pooled[part] = pooled[part] + row if part in pooled else row
    return {part: row.to(ranks.device) for part, row in pooled.items()}


def _remove(weight_OD: torch.Tensor, squared_sum_D: torch.Tensor, count: int, what: str) -> None:
    """Zero the `count` weights of a matrix with the lowest scores, in place."""
    if count:
        scores_OD = wanda_scores(weight_OD, squared_sum_D)
        require_finite(scores_OD, f"{what}: Wanda score")
        weight_OD.masked_fill_(smallest_per_row(scores_OD, count), 0)


def mask_layer(stream: LayerStream, layer: Layer, states: States, quota: LayerQuota) -> int:
    """Measure the layer and zero what its quota asks for, in place; returns the number of experts that saw no token."""
    ranks = stream.ranks
    names = [name for name, count in quota.dense.items() if count]
    if not names and not any(count for expert in quota.experts for count in expert.values()):
        return 0
    moments = _measure(stream, layer, states, names)
    owners = stream.writer_of(layer.layout)
    for name in names:
        weight = layer.dense[name]
        total_D = _sum_over_micro_batches(moments.dense[name], states, ranks, weight.shape[1])
        if owners[name] == ranks.rank:
            _remove(weight, total_D, quota.dense[name], name)
        ranks.broadcast(weight, owners[name])
    tokens_E = ranks.sum_integers(moments.tokens.to(ranks.device)).cpu()
    unseen = int((tokens_E == 0).sum())
    pooled = _pooled(moments, layer, ranks) if unseen else {}
    for number, expert in enumerate(layer.kept):
        if layer.owner[number] == ranks.rank:
            rows = moments.experts.get(number) or pooled
            for part, count in quota.experts[number].items():
                weight_OD = layer.layout.oriented(layer.experts[expert][part])
                _remove(weight_OD, rows[part], count, f"layer {layer.layout.index} expert {expert} {part}")
    return unseen
