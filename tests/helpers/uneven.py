"""Checkpoints whose layers keep different numbers of experts."""

from __future__ import annotations

import json

import torch

from helpers.family_runs import CALIBRATION
from helpers.stock import load_stock
from helpers.zoo import make_checkpoint
from stun.checkpoint.reader import Checkpoint
from stun.config import Budget, ExpertsConfig, ModelConfig, PruneConfig, Scope, SparsifyConfig
from stun.model.architecture import Architecture
from stun.pruning.job import prune


def pruned(source, run_dir, ranks, **changes):
    """Whole experts only, by one threshold over all layers."""
    experts = ExpertsConfig(fraction=1.0, budget=Budget["global"], kappa=0)
    request = {"target": 0.2, "experts": experts, "sparsify": SparsifyConfig(scope=[]), **changes}
    prune(PruneConfig(ModelConfig(str(source)), CALIBRATION, run_dir=str(run_dir), **request), ranks)
    return run_dir / "model", [layer["kept"] for layer in json.loads((run_dir / "plan.json").read_text())["layers"]]


def steep(folder, family, **changes):
    """A checkpoint whose routers differ in scale from layer to layer, so that one threshold takes more of some."""
    own = {"layer_types": None} if family == "gpt_oss" else {}
    make_checkpoint(folder, family, num_hidden_layers=4, **own, **changes)
    model = load_stock(folder)
    arch = Architecture(Checkpoint.open(folder))
    with torch.no_grad():
        for layout in arch.layers:
            if layout.experts:
                weight = model.base_model.layers[layout.index].get_parameter(layout.dense[layout.router])
                weight.mul_(1 + 0.6 * layout.index)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def target_of(source, experts: int) -> float:
    from stun.planning.budget import measure_layers

    sizes = measure_layers(Architecture(Checkpoint.open(source)), list(Scope))
    one = next(size.expert for size in sizes if size.experts)
    return experts * one / sum(size.total for size in sizes)
