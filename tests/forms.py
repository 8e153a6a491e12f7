"""Checkpoints of unusual forms, and a run on one."""

from __future__ import annotations

import json

import torch
from conftest import load_tensors
from family_runs import CALIBRATION
from safetensors.torch import save_file
from selections import config
from zoo import make_checkpoint

from stun.checkpoint.writer import write_index
from stun.config import ExpertsConfig
from stun.pruning.job import prune

UNIFORM = ExpertsConfig(fraction=0.5)


def run(source, run_dir, ranks, target=0.4, experts=UNIFORM):
    """(folder, plan, summary) of one run."""
    summary = prune(config(source, run_dir, target, experts, calibration=CALIBRATION), ranks)
    return run_dir / "model", json.loads((run_dir / "plan.json").read_text()), summary


def rewrite(folder, tensors, **config):
    """Replace a checkpoint's tensors, in two files, and change its config.json."""
    for file in folder.glob("model*"):
        file.unlink()
    names = sorted(tensors)
    halves = {"model-a.safetensors": names[::2], "model-b.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name].contiguous() for name in own}, folder / file, metadata={"format": "pt"})
    write_index(folder, {file: {name: tensors[name].nbytes for name in own} for file, own in halves.items()})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))


def with_head(folder, family: str, last: str, head: str):
    """Give a checkpoint a prediction head at `head`, a copy of its layer `last` with other weights and a projection."""
    make_checkpoint(folder, family)
    tensors = load_tensors(folder)
    own = {name.replace(last, head): t + 0.05 * torch.randn_like(t) for name, t in tensors.items() if name.startswith(last)}
    router = own[f"{head}mlp.gate.weight"]
    router[1:4] = router[0] + 0.001 * torch.randn(3, 32)  # without groups, all that leave would leave the first
    rewrite(folder, {**tensors, **own, f"{head}eh_proj.weight": torch.randn(32, 64)})
    return own
