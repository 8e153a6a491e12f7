"""What tests of several folders are given: this process as a rank, small checkpoints, statistics of one."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("helpers")  # before they are imported, so that their assertions show values too

from helpers.selections import config  # noqa: E402
from helpers.zoo import make_checkpoint  # noqa: E402
from stun.pruning.job import take_statistics  # noqa: E402
from stun.runtime.ranks import Ranks  # noqa: E402


def pytest_configure(config) -> None:
    """Tests that run side by side get cores of their own: threads of two jobs on one core wait for one another."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        number, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = sorted(os.sched_getaffinity(0))
        own = cores[number::count] or cores
        os.sched_setaffinity(0, own)
        torch.set_num_threads(len(own))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """What starts several ranks, Slurm or a browser is slow. Tests stay with those of their file on one worker, but for those
    that are `slow(seconds)`, which go to whichever is free; what takes longest begins first."""
    seconds: dict[str, float] = defaultdict(float)
    for item in items:
        if any(item.get_closest_marker(name) for name in ("ranks", "slurm", "browser")):
            item.add_marker("slow")
        told = sum(mark.args[0] for mark in item.iter_markers("slow") if mark.args)
        unit = item.get_closest_marker("xdist_group")
        if not unit:
            unit = pytest.mark.xdist_group(item.name if told else item.path.stem).mark
            item.add_marker(pytest.mark.xdist_group(unit.args[0]))
        seconds[unit.args[0]] += told or (1 if item.get_closest_marker("slow") else 0.1)
    items.sort(key=lambda item: -seconds[item.get_closest_marker("xdist_group").args[0]])


@pytest.fixture(scope="module")
def ranks():
    """This process as the only rank."""
    with Ranks() as started:
        yield started


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(family, **how)`: the folder of such a checkpoint, made once a test run."""
    made: dict[str, Path] = {}

    def get(family: str, **how) -> Path:
        key = f"{family} {sorted((k, str(v)) for k, v in how.items())}"
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family) / "model", family, **how)
        return made[key]

    return get


@pytest.fixture(scope="module")
def observed(tmp_path_factory, ranks):
    """(checkpoint, run folder with its statistics)."""
    folder = tmp_path_factory.mktemp("observed")
    source = make_checkpoint(folder / "source", "mixtral", num_local_experts=12)
    take_statistics(config(source, folder / "run"), ranks)
    return source, folder / "run"
