"""Kernels and host syncs of pieces of a layer, counted on a pretend GPU and printed as JSON: -m helpers.gpu_counts SOURCE TWICE.

SOURCE and TWICE are checkpoints that differ in their number of experts, the second has twice as many.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from helpers.pretend.records import counted
from stun.checkpoint.reader import Checkpoint
from stun.config import SparsifyConfig
from stun.model.architecture import Architecture
from stun.run.kurtosis import power_sums
from stun.runtime.ranks import Ranks
from stun.sparsify.matrix import sparsify
from stun.sparsify.saliency import Saliency
from stun.statistics.accumulators import weight_sums
from stun.statistics.observe import Watcher
from stun.stream.layer_stream import LayerStream, embed, even_owners

UP, DOWN = (9728, 7168), (7168, 4864)  # matrices of an expert of Arctic


def count(work: Callable[[], object]) -> dict[str, int]:
    with counted() as found:
        work()
    return {kind: found[kind] for kind in ("kernels", "syncs")}


def matrices(divisor: int) -> list[torch.Tensor]:
    """An expert of Arctic's width, with `divisor` times fewer rows."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows // divisor, columns, generator=generator).bfloat16().to("cuda") for rows, columns in (UP, DOWN)]


def masked() -> None:
    """Masks of an expert's matrices by Wanda, and the histograms of their scores."""
    saliency, config = Saliency(), SparsifyConfig()
    for weight_OD in matrices(64):
        moment_D = torch.ones(weight_OD.shape[1], dtype=torch.float64, device="cuda")
        dense_OD = weight_OD.clone()
        sparse_OD = sparsify(config, weight_OD, moment_D, weight_OD.numel() * 2 // 5, "x")
        saliency.add(config, dense_OD, sparse_OD == 0, moment_D)


def micro_batch(source: Path, ranks: Ranks, is_observed: bool) -> Callable[[], object]:
    """A micro-batch through the first layer; every expert gets tokens."""
    arch = Architecture(Checkpoint.open(source))
    generator = torch.Generator().manual_seed(0)
    states = embed(arch, ranks, [torch.randint(3, 250, (4, 100), generator=generator)], arch.source.read)
    stream = LayerStream(arch, ranks, arch.layers[:1], [even_owners(arch.layers[0], 1)])
    layer = next(iter(stream))
    stream.build(layer)
    observers = [Watcher(arch.layers[0].num_experts, [0], ranks)] if is_observed else []
    return lambda: stream.run(layer, states, *observers)


def per_expert(source: Path, twice: Path, ranks: Ranks, is_observed: bool) -> dict[str, float]:
    """What one more expert adds to a micro-batch, from a layer with twice as many."""
    few, many = (count(micro_batch(place, ranks, is_observed)) for place in (source, twice))
    experts = Architecture(Checkpoint.open(source)).layers[0].num_experts
    return {kind: (many[kind] - few[kind]) / experts for kind in few}


def main(source: str, twice: str) -> None:
    with Ranks() as ranks, torch.no_grad():
        expert = matrices(1)
        places = Path(source), Path(twice)
        found = {
            "weight_sums of an expert": count(lambda: weight_sums(expert)),
            "power_sums of an expert": count(lambda: power_sums(expert)),
            "masks of an expert": count(masked),
            "a micro-batch": count(micro_batch(places[0], ranks, False)),
            "a micro-batch, observed": count(micro_batch(places[0], ranks, True)),
            "an expert in a micro-batch": per_expert(*places, ranks, False),
            "an expert in a micro-batch, observed": per_expert(*places, ranks, True),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
