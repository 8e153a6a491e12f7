"""Memory of an evaluation on a GPU, of Arctic's layers, from shapes alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stun.benchmark.checkpoints import arctic, shapes_of
from stun.benchmark.config import CheckpointShape
from stun.checkpoint.headers import TensorInfo
from stun.checkpoint.reader import Checkpoint
from stun.config import Precision, StunError
from stun.evaluation.memory import generation_capacity, scoring_batch
from stun.model.architecture import Architecture

SHAPE = CheckpointShape(layers=3, hidden=7168, expert_width=4864, experts=128, top_k=2, vocabulary=32000)
GPU = SimpleNamespace(device=torch.device("cuda", 0), world=1, rank=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three layers of Arctic, without bytes."""
    config = arctic(SHAPE)
    config.dtype = torch.bfloat16
    infos = {name: TensorInfo(Path("none"), 0, 2 * math.prod(s), torch.bfloat16, s) for name, s in shapes_of(config)}
    folder = tmp_path_factory.mktemp("arctic")
    config.save_pretrained(folder)
    return Checkpoint(folder, json.loads(config.to_json_string()), infos)


def give(monkeypatch, free: float) -> None:
    monkeypatch.setattr("stun.evaluation.memory.free_memory", lambda ranks: int(free))


def test_a_gpu_holds_one_layer(source, monkeypatch):
    """27.4 GB a layer: in 80 GB there is room for many rows, in 141 GB layers are held for the next token too."""
    arch = Architecture(source)
    give(monkeypatch, 78e9)
    assert scoring_batch(arch, 1, [1024] * 512, 0, GPU) >= 16
    assert generation_capacity(arch, [900] * 512, 100, 0, GPU).held_layers == 0
    give(monkeypatch, 139e9)
    assert scoring_batch(arch, 2, [1024] * 512, 0, GPU) >= 16
    assert generation_capacity(arch, [900] * 512, 100, 0, GPU).held_layers >= 1
    give(monkeypatch, 30e9)
    with pytest.raises(StunError, match="out of memory"):
        scoring_batch(arch, 1, [1024] * 512, 0, GPU)


def test_converted_weights_count_where_the_dtype_differs(source, monkeypatch):
    give(monkeypatch, 46e9)
    sizes = [scoring_batch(Architecture(source, p), 1, [1024] * 64, 0, GPU) for p in (Precision.auto, Precision.float32)]
    assert sizes[0] > sizes[1]
