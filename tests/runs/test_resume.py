"""A run that was killed continues to the same bytes; what it needs for that is checked before it is used."""

from __future__ import annotations

import fcntl
import json
import re

import pytest

from helpers.family_runs import FAMILY, run
from helpers.kill_jobs import JOBS
from helpers.kill_runs import KILLS, LAYERS, request
from helpers.launches import run_warm
from helpers.stops import stopped_after
from helpers.tensors import load_tensors, same_tensors
from helpers.zoo import make_checkpoint
from stun.config import StunError
from stun.pruning.job import prune


@pytest.mark.ranks
@pytest.mark.slow
def test_killed_at_any_instant(tmp_path):
    """At each kind of instant of both streams, one rank of two or both; what goes on has one, two or four ranks."""
    source = make_checkpoint(tmp_path / "source", "arctic", num_hidden_layers=LAYERS)
    said = run_warm(["-m", "helpers.kill_runs", source, tmp_path / "runs"], 0).stdout
    done = re.findall(r"^(\d+) .*: layers done \[(.*)\]$", said, re.M)
    assert len(done) == len(KILLS)
    for (number, lines), kill in zip(done, KILLS.values(), strict=True):
        counts, kills = [int(count) for count in lines.split(", ")], len(kill) - 3
        assert 2 * LAYERS - 1 <= sum(counts) <= 2 * LAYERS + kills, f"run {number} did {counts}"  # a kill can take one line
        same_tensors(tmp_path / "runs" / "whole" / "model", tmp_path / "runs" / number / "model")
        left = {file.name for file in (tmp_path / "runs" / number).iterdir()}
        assert left == {"config.yaml", "layers.json", "manifest.json", "plan.json", "stats", "model"}


@pytest.mark.slow
def test_every_job_stopped_at_some_instant(tmp_path):
    """... by some signal goes on to the same bytes; files of others are left alone (helpers/kill_jobs.py)."""
    source = make_checkpoint(tmp_path / "source", "mixtral", num_hidden_layers=2)
    said = run_warm(["-m", "helpers.kill_jobs", source, tmp_path / "jobs", len(JOBS)], 0).stdout
    done = re.findall(r"^(\w+) \d+: .*: (.*)$", said, re.M)
    assert dict(done) == dict.fromkeys(JOBS, "the same"), said


@pytest.fixture
def interrupted(checkpoint, tmp_path, ranks):
    """`interrupted(stream, layer)`: a run folder whose stream ended once that layer was on disk, and the request for it."""

    def get(stream: str, layer: int):
        cfg = request(str(checkpoint("arctic")), tmp_path / "run")
        with stopped_after(stream, layer):
            prune(cfg, ranks)
        return cfg, tmp_path / "run"

    return get


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory, ranks):
    """The model of the same run, made in one go."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    prune(request(str(checkpoint("arctic")), folder), ranks)
    return folder / "model"


@pytest.mark.slow
@pytest.mark.parametrize("stream, layer", [("observe", 0), ("observe", 2), ("prune", 0), ("prune", 1), ("prune", 2)])
def test_continues_after_the_last_finished_layer(interrupted, whole, ranks, capsys, stream, layer):
    cfg, folder = interrupted(stream, layer)
    capsys.readouterr()
    assert prune(cfg, ranks)["sparsity"] == pytest.approx(0.5, abs=1e-4)
    lines = re.findall(r"\] (observe|prune) (\d+)/3", capsys.readouterr().out)
    streams = ["observe", "prune"]
    expected = [(s, f"{n + 1:02d}") for s in streams for n in range(3) if (streams.index(s), n) > (streams.index(stream), layer)]
    assert lines == expected
    same_tensors(whole, folder / "model")


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["observe", "prune"])
def test_damaged_snapshot(interrupted, ranks, stream):
    cfg, folder = interrupted(stream, 1)
    (file,) = (folder / "hidden").glob(f"{stream}-00001-*")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(StunError, match=rf"{file.name}: is damaged.*`progress`"):
        prune(cfg, ranks)
    file.unlink()
    with pytest.raises(StunError, match="is missing"):
        prune(cfg, ranks)
    assert (folder / "stats").is_dir() and not (folder / "manifest.json").exists()


@pytest.mark.slow
def test_lost_and_stray_files(interrupted, ranks):
    cfg, folder = interrupted("prune", 1)
    (folder / "model" / "layer-00007-0-of-9.safetensors").write_bytes(b"of a launch that never recorded it")
    (shard,) = (folder / "model").glob("layer-00000-*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(StunError, match=rf"{shard.name}: is too short"):
        prune(cfg, ranks)
    middle = len(whole) // 2
    shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(StunError, match=rf"{shard.name}: has changed since, but was written whole"):
        prune(cfg, ranks)
    shard.write_bytes(whole)
    prune(cfg, ranks)
    assert not [name for name in (file.name for file in (folder / "model").iterdir()) if name.startswith("layer-")]
    assert len(json.loads((folder / "model/model.safetensors.index.json").read_text())["weight_map"]) == len(
        load_tensors(folder / "model")
    )


@pytest.mark.slow
def test_another_source_does_not_continue(interrupted, ranks, tmp_path):
    import shutil
    from dataclasses import replace

    cfg, _ = interrupted("observe", 1)
    copy = tmp_path / "other"
    shutil.copytree(cfg.model.path, copy)
    shard = sorted(copy.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 64
    content[len(content) // 2] ^= 64
    shard.write_bytes(content)
    with pytest.raises(StunError, match="holds another run"):
        prune(replace(cfg, model=replace(cfg.model, path=str(copy))), ranks)


@pytest.mark.slow
def test_one_launch_at_a_time(checkpoint, ranks, tmp_path):
    """While another process is at work in the folder; afterwards the run goes on."""
    cfg = request(str(checkpoint("mixtral")), tmp_path / "run")
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StunError, match=r"run_dir=.*another launch is at work in it"):
            prune(cfg, ranks)
    assert not (tmp_path / "run" / "config.yaml").exists()
    prune(cfg, ranks)
    before = sorted(file.name for file in (tmp_path / "run").iterdir())
    prune(cfg, ranks)
    assert before == sorted(file.name for file in (tmp_path / "run").iterdir()) and ".lock" not in before


@pytest.mark.parametrize("family", ["glm_moe_dsa", "mistral_large4"])
def test_values_that_layers_hand_on_are_resumed(checkpoint, tmp_path, ranks, family):
    """Indices, and keys and values that layers share: what later layers read of earlier ones is in the snapshot."""
    source = checkpoint(family)
    run("both", source, tmp_path / "whole", ranks, FAMILY)
    with stopped_after("prune", 2):
        run("both", source, tmp_path / "resumed", ranks, FAMILY)
    run("both", source, tmp_path / "resumed", ranks, FAMILY)
    same_tensors(tmp_path / "whole" / "model", tmp_path / "resumed" / "model")
