"""Hostile inputs: each ends in this package's own error, in bounded time and memory, and touches nothing else. Most are made by a
seed, class by class (helpers/hostile.py); `python -m helpers.hostile` runs others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.bounds import Hang, bounded
from helpers.forms import fp8, rewrite
from helpers.hostile import CALIBRATION, CLASSES, failure, make_ready
from helpers.selections import config
from helpers.tensors import load_tensors, same_tensors
from stun.checkpoint.reader import Checkpoint
from stun.config import StunError
from stun.pruning.job import prune

# Cases of a class in the whole run; the fast core has `CORE` of each.
COUNTS = {"weights": 45, "config": 55, "tokenizer": 30, "others": 15, "template": 20, "plan": 30, "text": 20}
COUNTS |= {"interrupted": 35, "finished": 25, "evaluation": 25, "values": 35, "system": 15}
CORE = 5


@pytest.fixture(scope="module")
def ready(tmp_path_factory, ranks):
    return make_ready(tmp_path_factory.mktemp("hostile") / "ready", ranks)


def hold(name: str, seeds: range, tmp_path: Path, ready: Path, ranks) -> None:
    failures = [failure(name, seed, tmp_path / "case", ready, ranks) for seed in seeds]
    assert not any(failures), "\n".join(filter(None, failures))


@pytest.mark.parametrize("name", CLASSES)
def test_some_of_every_class(name, tmp_path, ready, ranks):
    hold(name, range(CORE), tmp_path, ready, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_many_of_every_class(name, tmp_path, ready, ranks):
    hold(name, range(CORE, COUNTS[name]), tmp_path, ready, ranks)


def request_for(folder: Path, **changes):
    return config(folder / "model", folder / "run", calibration=CALIBRATION, **changes)


def copied(ready: Path, folder: Path) -> Path:
    return shutil.copytree(ready / "model", folder / "model")


def test_a_block_larger_than_its_matrix_takes_no_more_memory(tmp_path, ranks):
    """The scale of one block for a whole matrix is repeated for the matrix, not for the block."""
    fp8(tmp_path / "model", "deepseek_v3", 8, 8)
    tensors = load_tensors(tmp_path / "model")
    whole = {name: tensor[:1, :1] if name.endswith("_scale_inv") else tensor for name, tensor in tensors.items()}
    rewrite(tmp_path / "model", whole, quantization_config={"quant_method": "fp8", "weight_block_size": [10**6, 10**6]})
    with bounded(2**20):
        source = Checkpoint.open(tmp_path / "model")
        assert torch.isfinite(source.read("model.layers.1.mlp.experts.0.up_proj.weight")).all()


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def cached(source: Path, folder: Path) -> Path:
    """The checkpoint as the hub's cache holds it: links in a snapshot to blobs."""
    snapshot, blobs = folder / "models--a--b" / "snapshots" / "c0ffee", folder / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


def test_the_cache_of_the_hub_is_read(ready, tmp_path, ranks):
    source = ready / "model"
    snapshot = cached(source, tmp_path)
    (tmp_path / "model").symlink_to(snapshot)
    prune(replace(request_for(tmp_path), target=0.0), ranks)
    same_tensors(source, tmp_path / "run" / "model")
    assert not any(file.is_symlink() for file in (tmp_path / "run" / "model").iterdir())


@pytest.mark.parametrize("target", ["../../../secret", "../../../models--a--evil/blobs/0", "../../refs/main", "../../blobs/out"])
def test_the_cache_of_the_hub_is_no_way_out(ready, tmp_path, ranks, target):
    snapshot = cached(ready / "model", tmp_path)
    file = snapshot / target
    file.resolve().parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to("/etc/passwd") if target.endswith("out") else file.write_text("{}")
    (snapshot / "notes.txt").symlink_to(target)
    (tmp_path / "model").symlink_to(snapshot)
    with pytest.raises(StunError, match=r"notes.txt: links to .*; only files in the checkpoint's own"):
        prune(request_for(tmp_path), ranks)
    assert not (tmp_path / "run").exists()


def test_links_inside_the_folder_are_followed(ready, tmp_path, ranks):
    copied(ready, tmp_path)
    (tmp_path / "model" / "notes.txt").symlink_to("config.json")
    prune(replace(request_for(tmp_path), target=0.0), ranks)
    assert (tmp_path / "run" / "model" / "notes.txt").is_file()


def test_code_beside_the_weights_is_not_run(ready, tmp_path, ranks):
    folder, marker = copied(ready, tmp_path), tmp_path / "marker"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nModel = Tokenizer = Config\n")
    maps = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
    for name in ("config.json", "tokenizer_config.json"):
        change(folder / name, auto_map=maps, trust_remote_code=True)
    prune(request_for(tmp_path), ranks)
    assert not marker.exists()
    change(folder / "tokenizer_config.json", tokenizer_class="Evil")
    shutil.rmtree(tmp_path / "run")
    try:
        prune(request_for(tmp_path), ranks)
    except StunError as error:
        assert "its tokenizer" in str(error)
    assert not marker.exists()


def test_the_bounds_hold():
    """Memory and time run out where they should, or nothing above means anything."""
    with bounded(0), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(2**32, dtype=torch.uint8)
    with pytest.raises(Hang), bounded(0, seconds=1):
        while True:
            pass
