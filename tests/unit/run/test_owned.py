"""Nothing is removed or written through a link, and no file that the run has not written."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from helpers.kill_runs import request
from helpers.paths import TEXT
from helpers.stops import stopped_after
from helpers.tensors import same_tensors
from jobs import compare
from stun.benchmark.config import CompareConfig, StudyConfig
from stun.benchmark.study import study
from stun.config import CalibrationConfig, ModelConfig, StunError
from stun.evaluation.config import EvaluateConfig
from stun.evaluation.job import evaluate
from stun.planning.from_statistics import plan_from_run
from stun.pruning.job import prune, take_statistics
from stun.report.write import write_reports
from stun.run.ownership import MARK, own_folder, remove_written
from stun.serving.config import Runtime, ServeCheckConfig
from stun.serving.job import serve_check


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


JOBS = {
    "plan": lambda model, file, ranks: plan_from_run(request(model.path, file.parent / "run"), file),
    "study": lambda model, file, ranks: study(StudyConfig(model, scores=str(file)), ranks),
    "compare": lambda model, file, ranks: compare.work(CompareConfig(model, target=0.4, run_dir=str(file.parent)), ranks),
    "serve-check": lambda model, file, ranks: serve_check(
        ServeCheckConfig(model, Runtime["transformers"], output=str(file)), ranks
    ),
    "evaluate": lambda model, file, ranks: evaluate(
        EvaluateConfig(model, text=CalibrationConfig(str(TEXT), samples=1, length=8), output=str(file)), ranks
    ),
}
TOLD = r"comparison.json: (something else is there, and stays|holds another|cannot be read|must hold)"


@pytest.mark.parametrize("job", JOBS)
def test_an_output_that_somebody_else_wrote_stays(checkpoint, tmp_path, ranks, job):
    """... and is told of before any work; another job's result is somebody else's too."""
    model, file = ModelConfig(str(checkpoint("arctic"))), tmp_path / "comparison.json"
    for content in ("my notes", "[1]", '{"mine": {"a": 1}}', '{"layers": 3, "dense": [], "runtimes": {}}'):
        file.write_text(content)
        with pytest.raises(StunError, match=TOLD):
            JOBS[job](model, file, ranks)
        assert contents(tmp_path) == {file.name: content.encode()}
    file.unlink()
    file.symlink_to("nowhere")
    with pytest.raises(StunError, match=r"comparison.json"):
        JOBS[job](model, file, ranks)
    assert file.is_symlink() and len(list(tmp_path.iterdir())) == 1


def test_a_log_that_somebody_else_wrote_stays(checkpoint, tmp_path, ranks):
    (tmp_path / "served.log").write_text("mine")
    cfg = ServeCheckConfig(ModelConfig(str(checkpoint("arctic"))), Runtime["transformers"], output=str(tmp_path / "served.json"))
    with pytest.raises(StunError, match=r"served.log: .* was not written by stun serve-check"):
        serve_check(cfg, ranks)
    assert contents(tmp_path) == {"served.log": b"mine"}
