"""A job that Slurm queues again and again is stopped once its launches finish nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stun.config import StunError
from stun.run.launches import LAUNCHES, check_progress
from stun.run.lock import LOCK, hold, let_go


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """`launched(restarts)`: a launch of a job that Slurm has started so many times again."""

    def launch(restarts: int) -> None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        check_progress(tmp_path, "run_dir=r")

    return launch


def test_a_layer_that_never_fits_into_the_time_limit(launched, tmp_path):
    launched(0)
    launched(1)
    with pytest.raises(StunError, match=r"run_dir=r: 2 launches finished no layer; one must fit into the time limit.*--time"):
        launched(2)
    launched(3)  # whoever starts it once more has changed something


def test_progress_and_a_new_submission_count_anew(launched, tmp_path):
    for restarts in range(4):
        (tmp_path / f"prune-0000{restarts}-0-of-1.json").write_text("{}")
        launched(restarts)
    launched(4)
    launched(0)
    launched(1)
    with pytest.raises(StunError):
        launched(2)


def test_launches_without_slurm_are_not_counted(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    for _ in range(5):
        check_progress(tmp_path, "run_dir=r")
    assert [file.name for file in tmp_path.iterdir()] == [LAUNCHES]


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda file: file.symlink_to(file.parent / "elsewhere"), Path.mkdir], ids=["pipe", "link", "folder"]
)
def test_a_lock_that_is_none(tmp_path, make):
    """It is neither waited for nor followed."""
    make(tmp_path / LOCK)
    try:
        with pytest.raises((StunError, OSError)):
            hold(tmp_path, "run_dir=r")
    finally:
        let_go()
    assert not (tmp_path / "elsewhere").exists()
