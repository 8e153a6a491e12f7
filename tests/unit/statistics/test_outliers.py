"""Scores per token of dense matrices, from which layers' outliers are counted."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from stun.checkpoint.reader import Checkpoint
from stun.model.architecture import Architecture
from stun.sparsify.scores import wanda_scores
from stun.statistics.outliers import OutlierCounter
from stun.stream.layer_stream import LayerStream, embed, even_owners


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v4"])  # one stream of hidden states, and several
def test_sums_of_dense_matrices(checkpoint, ranks, family):
    arch = Architecture(Checkpoint.open(checkpoint(family)))
    tokens_BT = torch.randint(3, 250, (4, 32), generator=torch.Generator().manual_seed(0))
    states = embed(arch, ranks, [tokens_BT], arch.source.read)
    stream = LayerStream(arch, ranks, arch.layers, [even_owners(layout, 1) for layout in arch.layers])
    layer = next(iter(stream))
    stream.build(layer)
    counter, inputs = OutlierCounter(stream, layer), {}

    def keep(name, module, arguments) -> None:
        inputs[name] = arguments[0].flatten(0, -2).double()

    for name in counter.names:
        module = layer.module.get_submodule(layer.layout.dense[name].rpartition(".")[0])
        module.register_forward_pre_hook(partial(keep, name))
    counter.run(states)
    totals = counter.totals()
    assert counter.names
    for name in counter.names:
        mean_D = inputs[name].square().sum(0) / len(inputs[name])
        torch.testing.assert_close(float(totals[f"sum of {name}"]), float(wanda_scores(layer.dense[name], mean_D).double().sum()))
