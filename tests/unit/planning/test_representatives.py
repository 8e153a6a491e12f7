"""Who stays of a cluster, and what takes its place."""

from __future__ import annotations

import pytest
import torch

from helpers.selections import config
from helpers.stock import load_stock
from helpers.tensors import load_tensors
from helpers.uneven import target_of
from helpers.zoo import make_checkpoint
from stun.checkpoint.reader import Checkpoint
from stun.config import ExpertsConfig, Representative, Scope, SparsifyConfig
from stun.model.architecture import Architecture
from stun.planning.plan_file import read_layers
from stun.pruning.job import prune


def members_of(layout, tensors, expert: int, part: str) -> torch.Tensor:
    return torch.cat([tensors[name] for name in layout.experts[expert][part]])


def test_the_nearest_to_the_mean_stays(observed, tmp_path, ranks):
    """Brute force over all parameters of a cluster's members."""
    source = observed[0]
    experts = ExpertsConfig(fraction=1.0, kappa=0)
    prune(config(source, tmp_path / "run", target_of(source, 18), experts, sparsify=SparsifyConfig(scope=[])), ranks)
    layers, *_ = read_layers(tmp_path / "run" / "plan.json")
    tensors, arch, decided = load_tensors(source), Architecture(Checkpoint.open(source)), 0
    for layout, layer in zip(arch.layers, layers, strict=True):
        for cluster in (members for members in layer.clusters if len(members) > 2):
            flat = {
                e: torch.cat([members_of(layout, tensors, e, p).flatten() for p in sorted(layout.experts[e])]).double()
                for e in cluster
            }
            mean = sum(flat.values()) / len(flat)
            assert min(cluster, key=lambda e: float((flat[e] - mean).norm())) in layer.kept
            decided += 1
    assert decided


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "ernie4_5_moe"])
def test_reconstruction_takes_the_cluster_mean(tmp_path, ranks, family):
    source = make_checkpoint(tmp_path / "source", family)
    target = {"ernie4_5_moe": 0.3}.get(family, 0.45)
    experts = ExpertsConfig(fraction=1.0, kappa=8, representative=Representative.score)
    prune(config(source, tmp_path / "run", target, experts, sparsify=SparsifyConfig(scope=list(Scope))), ranks)
    layers, *_ = read_layers(tmp_path / "run" / "plan.json")
    before, after = load_tensors(source), load_tensors(tmp_path / "run" / "model")
    arch, pruned = Architecture(Checkpoint.open(source)), Architecture(Checkpoint.open(tmp_path / "run" / "model"))
    merged = 0
    for layout, own, layer in zip(arch.layers, pruned.layers, layers, strict=True):
        for number, expert in enumerate(layer.kept):
            cluster = next(members for members in layer.clusters if expert in members)
            merged += len(cluster) > 1
            for part in layout.experts[expert]:
                mean = sum(arch.read_expert(layout, e)[part] for e in cluster) / len(cluster)
                written = pruned.read_expert(own, number)[part]
                same = torch.where(written == 0, written, mean.to(written.dtype))  # some weights may be zeroed besides
                torch.testing.assert_close(written, same, atol=1e-6, rtol=1e-6)
                assert (written == 0).float().mean() < 0.3
            for name, dim in layout.routed.items():
                mean = sum(before[name].select(dim, e) for e in cluster) / len(cluster)
                torch.testing.assert_close(after[name].select(dim, number), mean, atol=1e-6, rtol=1e-6)
    assert merged
    load_stock(tmp_path / "run" / "model")
