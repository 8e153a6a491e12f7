"""Nothing is removed or written through a link, and no file that the run has not written."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from helpers.kill_runs import request
from helpers.stops import stopped_after
from helpers.tensors import same_tensors
from stun.config import StunError
from stun.pruning.job import prune, take_statistics
from stun.report.write import write_reports
from stun.run.ownership import MARK, own_folder, remove_written


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def interrupted(checkpoint, tmp_path, ranks):
    """The request of a run that ended after a layer of its second stream, and another checkpoint beside it."""
    cfg = request(str(checkpoint("arctic")), tmp_path / "run")
    with stopped_after("prune", 0):
        prune(cfg, ranks)
    other = tmp_path / "other"
    shutil.copytree(checkpoint("arctic"), other)
    (other / "notes").mkdir()
    (other / "notes" / "layer-00000-0-of-1.safetensors").write_text("mine")
    (other / "layer-00007-0-of-1.safetensors").write_text("mine too")
    return cfg, tmp_path / "run", other


@pytest.mark.parametrize("part", ["model", "progress", "hidden", "stats"])
@pytest.mark.parametrize("how", ["link", "other folder"])
def test_a_part_of_the_run_is_another_folder(interrupted, ranks, part, how):
    cfg, run, other = interrupted
    if part == "stats":
        (run / "stats" / "about.json").unlink()  # else nothing is written there any more
    kept = contents(other)
    shutil.move(run / part, run.parent / "away")
    if how == "link":
        (run / part).symlink_to(other)
    else:
        shutil.copytree(other, run / part)
    with pytest.raises(StunError, match=rf"/run/{part}: (is a link|holds files not written by this run)"):
        prune(cfg, ranks)
    assert contents(run / part) == kept == contents(other)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00009.safetensors", "notes.txt", "folder/x", "layer-00001-0-of-9.safetensors/x"]
)
def test_a_file_of_somebody_else_in_the_model(interrupted, ranks, name):
    cfg, run, _ = interrupted
    (run / "model" / name).parent.mkdir(exist_ok=True)
    (run / "model" / name).write_text("mine")
    kept = contents(run / "model")
    with pytest.raises(StunError, match=r"was not written by this run"):
        prune(cfg, ranks)
    assert contents(run / "model") == kept


def test_remains_of_an_interrupted_launch_go(interrupted, ranks, tmp_path):
    cfg, run, _ = interrupted
    for name in ("layer-00001-2-of-3.safetensors", ".layer-00001-2-of-3.safetensors.tmp"):
        (run / "model" / name).write_text("half")
    prune(cfg, ranks)
    prune(request(cfg.model.path, tmp_path / "whole"), ranks)
    same_tensors(tmp_path / "whole" / "model", run / "model")
    assert contents(run / "model").keys() == contents(tmp_path / "whole" / "model").keys()
    assert not list(run.rglob(MARK))


def test_a_run_in_another_place(interrupted, ranks, tmp_path):
    """A run folder that was copied goes on."""
    cfg, run, _ = interrupted
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(run)
    (tmp_path / "copy").rename(run)
    assert prune(cfg, ranks)["sparsity"] > 0


@pytest.mark.parametrize("how", ["link", "other folder"])
def test_report(checkpoint, tmp_path, ranks, how):
    cfg = request(str(checkpoint("arctic")), tmp_path / "run")
    prune(cfg, ranks)
    pictures, report = tmp_path / "pictures", tmp_path / "run" / "report"
    pictures.mkdir()
    (pictures / "experts-of-layer-000.png").write_text("mine")
    report.symlink_to(pictures) if how == "link" else shutil.copytree(pictures, report)
    with pytest.raises(StunError, match=r"is a link|not written by"):
        write_reports(tmp_path / "run")
    assert contents(report) == contents(pictures) == {"experts-of-layer-000.png": b"mine"}


def test_remove_written(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.json").write_text("mine")
    own = tmp_path / "own"
    own_folder(own, "run")
    (own / "to").symlink_to(outside)
    (own / "b.json").symlink_to(outside / "a.json")
    for name in ("a.json", "a.txt"):
        (own / name).write_text("")
    remove_written(own, r"(.*/)?\w\.json")
    assert {file.name for file in own.iterdir()} == {MARK, "to", "b.json", "a.txt"} and contents(outside) == {"a.json": b"mine"}
    (tmp_path / "link").symlink_to(own)
    remove_written(tmp_path / "link", ".*")
    assert (own / "a.txt").exists()


@pytest.mark.parametrize("name", ["hidden/observe-00000-0-of-1.safetensors", "progress/notes"])
def test_a_launch_that_ended_while_it_cleared(checkpoint, tmp_path, ranks, name):
    """Statistics have no manifest: every launch goes through the folders again."""
    cfg, run = request(str(checkpoint("arctic")), tmp_path / "run"), tmp_path / "run"
    take_statistics(cfg, ranks)
    (run / name).parent.mkdir()
    for mark in (run / MARK, run / name):
        mark.with_name(MARK).write_text("a name\n")
    (run / name).write_text("{}")
    before = contents(run / "stats")
    for _ in range(2):
        take_statistics(cfg, ranks)
    assert contents(run / "stats") == before and (run / name).exists() == (name == "progress/notes")


def test_a_launch_that_ended_while_it_marked(tmp_path):
    (tmp_path / f".{MARK}.tmp").touch()
    own_folder(tmp_path, "run")
    assert contents(tmp_path) == {MARK: b"run\n"}


def test_statistics_of_another_run_are_left_alone(checkpoint, tmp_path, ranks):
    """jobs.observe collects its own, whatever `statistics` says."""
    cfg = request(str(checkpoint("arctic")), tmp_path / "run")
    (tmp_path / "other").mkdir()
    take_statistics(replace(cfg, statistics=str(tmp_path / "other")), ranks)
    assert (tmp_path / "run" / "stats" / "about.json").is_file() and not list((tmp_path / "other").iterdir())


def test_a_finished_run_needs_its_shared_statistics_no_more(checkpoint, tmp_path, ranks):
    cfg = request(str(checkpoint("arctic")), tmp_path / "run")
    take_statistics(replace(cfg, run_dir=str(tmp_path / "shared")), ranks)
    shared = replace(cfg, statistics=str(tmp_path / "shared"))
    summary = prune(shared, ranks)
    shutil.rmtree(tmp_path / "shared")
    assert prune(shared, ranks) == summary
